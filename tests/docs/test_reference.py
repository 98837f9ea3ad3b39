"""The reference is what the code says, and the manual's links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest
from holdfast.cli.main import VERBS
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.settings import SETTINGS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])


def test_the_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert (ROOT / "docs" / "reference.md").read_text() == reference.text(), "run `make docs`"


def test_the_reference_has_everything() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for setting in SETTINGS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{setting.name}` |"))
        assert row.rstrip(" |").count("|") >= 4, (
            f"{setting.name} has no meaning: document {setting.field} in ClusterConfig"
        )
    for verb in VERBS:
        assert f"### holdfast {verb}\n" in text
    for code in ExitCode:
        assert f"| {int(code)} |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_manual_are_commands(page: Path) -> None:
    """Every `holdfast VERB --option` that the manual shows exists."""
    reference = (ROOT / "docs" / "reference.md").read_text()
    for line in re.findall(r"^(?:\$ )?(holdfast [a-z].*)$", page.read_text(), re.MULTILINE):
        words = line.partition("#")[0].split()
        assert words[1] in VERBS, line
        section = reference.partition(f"### holdfast {words[1]}\n")[2].partition("\n### ")[0]
        for word in words[2:]:
            if word.startswith("--"):
                assert word in section, f"{word} in {line!r}"
