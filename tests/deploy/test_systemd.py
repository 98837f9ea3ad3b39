"""The unit passes systemd's own checks, and says what the keeper relies on."""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from holdfast.daemon import keeper

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "holdfast.service"
EXPOSURE_MAX = 2.0  # of 10, in systemd-analyze's own scale; 'OK' ends at 5

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # documented way to keep the case of keys
    parser.read(UNIT)
    return parser["Service"]


def analyze(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze on the unit, with a program that exists here in the place of the installed one."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/holdfast/bin/holdfast", "/bin/true"))
    return subprocess.run(
        ["systemd-analyze", *words, str(unit)], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )  # fmt: skip


@needs_systemd
def test_systemd_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    found = analyze(tmp_path, "verify", "--man=no")
    said = [line for line in found.stderr.splitlines() if UNIT.name in line]
    assert said == []


@needs_systemd
def test_systemd_calls_it_well_closed(tmp_path: Path) -> None:
    found = analyze(tmp_path, "security", "--offline=true")
    score = re.search(r"Overall exposure level for holdfast\.service: ([0-9.]+)", found.stdout)
    if score is None:
        pytest.skip(f"this systemd-analyze can't judge a file: {found.stderr[-200:]}")
    assert float(score[1]) <= EXPOSURE_MAX, found.stdout


def test_the_unit_says_what_the_keeper_relies_on() -> None:
    unit = service()
    assert unit["Type"] == "notify"
    assert unit["NotifyAccess"] == "main"
    assert int(unit["FileDescriptorStoreMax"]) >= 2 * 64 + 1
    assert "start limit" in UNIT.read_text()
    assert "StartLimitIntervalSec=0" in UNIT.read_text()
    assert set(map(int, unit["RestartPreventExitStatus"].split())) == keeper.REFUSING_EXITS
    assert float(unit["TimeoutStopSec"].removesuffix("s")) > keeper.STOP_WAIT_S
    assert float(unit["WatchdogSec"].removesuffix("s")) > 5 * keeper.LOOK_S
    assert "DynamicUser" not in unit
    assert "HUP" in unit["ExecReload"]
