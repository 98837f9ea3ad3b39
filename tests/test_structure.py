"""What the house rules say of the code's shape, held by a machine."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("coding", "protocol", "client", "daemon", "cli")
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room / "holdfast").rglob("*.py"))
PYTHON = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")])
FORBIDDEN_STEMS = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_a_file_holds_one_concept_and_so_do_its_functions(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= FILE_LINES_MAX, f"{lines} lines, {FILE_LINES_MAX} are the limit: find the second concept inside"
    for node in functions(path):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length <= FUNCTION_LINES_MAX, f"{node.name}: {length} lines, {FUNCTION_LINES_MAX} are the limit"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_file_says_what_it_covers_and_is_named_for_it(path: Path) -> None:
    assert path.stem not in FORBIDDEN_STEMS
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a file begins with what it covers"


def test_each_room_is_typed_and_none_shadows_another() -> None:
    for room in ROOMS:
        assert (ROOT / room / "holdfast" / room / "py.typed").exists(), room
        assert not (ROOT / room / "holdfast" / "__init__.py").exists(), "holdfast is shared by the rooms"


def test_sockets_have_one_door_per_room() -> None:
    users = {name(path) for path in SOURCES if re.search(r"^\s*(import|from) zmq\b", path.read_text(), re.MULTILINE)}
    assert users == {
        "cli/holdfast/cli/link.py",
        "client/holdfast/client/link.py",
        "daemon/holdfast/daemon/shell/network.py",
    }
