"""`holdfast config`: golden output, JSON, exit codes."""

import json
from pathlib import Path

import pytest
from holdfast.cli.config import CONFIG_FILE_BYTES_MAX
from holdfast.cli.main import main
from holdfast.coding import select_engine
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.settings import SETTINGS

GOOD = """
[cluster]
name = "tiny"
parity = 1
[memory]
budget = "8GiB"
[[node]]
name = "a"
address = "h1:7000"
[[node]]
name = "b"
address = "[fd00::2]:7000"
domain = "rack-2"
"""

SHOWN = """\
setting                    value            from
cluster.name               tiny             file c.toml
cluster.parity             1                file c.toml
cluster.group_size         8                default
cluster.epoch              3                environment HOLDFAST_CLUSTER_EPOCH
cluster.reprotect_after_s  0                default
memory.budget              8GiB             file c.toml
memory.slots               2                default
memory.chunk_bytes         1MiB             default
memory.closed_job_s        86400            default
security.keys_dir          none             default
security.bulk              digest           default
http.address               off              default
http.allow_remote          false            default
trainers.address           off              default
daemon.socket              /run/x           environment HOLDFAST_SOCKET
daemon.socket_group        none             default
scrub.period_s             600              default
scrub.bandwidth            256MiB           default
scrub.cpu_percent          5                default
drill.period_s             600              default
durable.dir                off              default
durable.every_s            1800             default
durable.every_steps        0                default
durable.keep               2                default
durable.grace_s            20               default
durable.after_lives        0                default
daemon.state_dir           socket's folder  default
daemon.engine              auto             default

node  name  address         domain  group
0     a     h1:7000         a       0
1     b     [fd00::2]:7000  rack-2  0

digest  20c02d0c24b92dae  (equal on all nodes of a cluster)
engine  {name} on this machine ({detail})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and no variable of ours."""
    monkeypatch.chdir(tmp_path)
    for setting in SETTINGS:
        monkeypatch.delenv(setting.environment_name, raising=False)
    monkeypatch.delenv("HOLDFAST_SOCKET", raising=False)
    (tmp_path / "c.toml").write_text(GOOD)
    return tmp_path


def test_a_good_file_is_said_to_be_good(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "c.toml"]) == ExitCode.DONE
    out = capsys.readouterr().out
    assert out.startswith("c.toml: good. Cluster 'tiny', epoch 1: 2 nodes in 1 group, parity 1. Digest ")


def test_a_warning_does_not_make_a_file_bad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.toml").write_text(GOOD.replace("parity = 1", "parity = 0"))
    assert main(["config", "check", "c.toml"]) == ExitCode.DONE
    assert "  warning: Parity 0: " in capsys.readouterr().out


def test_all_that_is_wrong_goes_to_stderr_with_exit_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.toml").write_text(GOOD.replace("parity = 1", "parity = 2").replace("8GiB", "8GB"))
    assert main(["config", "check", "c.toml"]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "holdfast: c.toml: 1 problem\n"
        "  memory.budget: expected one of the units B, KiB, MiB, GiB, TiB; found 'GB' in '8GB'; did you mean GiB?\n"
        "Correct this, then try: holdfast config check c.toml\n"
    )


def test_check_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "c.toml", "--json"]) == ExitCode.DONE
    good = json.loads(capsys.readouterr().out)
    assert (good["schema"], good["good"], good["problems"]) == ("holdfast.config-check/1", True, [])
    (folder / "c.toml").write_text(GOOD + "[memroy]\n[zzz]\n")
    assert main(["config", "check", "c.toml", "--json"]) == ExitCode.USAGE
    bad = json.loads(capsys.readouterr().out)
    assert bad["good"] is False
    assert [problem["field"] for problem in bad["problems"]] == ["memroy", "zzz"]


def test_show_gives_every_value_and_its_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOLDFAST_CLUSTER_EPOCH", "3")
    monkeypatch.setenv("HOLDFAST_SOCKET", "/run/x")
    assert main(["config", "show", "c.toml"]) == ExitCode.DONE
    engine = select_engine()
    assert capsys.readouterr().out == SHOWN.format(name=engine.name, detail=engine.detail)


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "c.toml", "--json"]) == ExitCode.DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["schema"] == "holdfast.config/1"
    assert shown["values"]["memory.budget"] == {"value": 8 << 30, "origin": "file c.toml"}
    assert shown["values"]["security.keys_dir"] == {"value": None, "origin": "default"}
    assert set(shown["values"]) == {setting.name for setting in SETTINGS}
    assert shown["nodes"][1] == {
        "index": 1,
        "name": "b",
        "address": "[fd00::2]:7000",
        "domain": "rack-2",
        "domain_origin": "file c.toml",
    }
    assert shown["groups"] == [["a", "b"]]


@pytest.mark.parametrize("part", ["check", "show"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "not UTF-8 text (byte 0)"),
        (b"#" * (CONFIG_FILE_BYTES_MAX + 1), "more than 4MiB"),
    ],
)
def test_what_is_no_config_is_refused_and_says_what_to_give(
    part: str, content: bytes | None, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (folder / "other").write_bytes(content)
    assert main(["config", part, "other"]) == ExitCode.USAGE
    err = capsys.readouterr().err
    assert words in err
    assert "give the path of the cluster's TOML file" in err
