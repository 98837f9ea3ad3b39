"""The unit under a real systemd, booted in namespaces of its own: whatever ends the processes, the snapshot stays.

Run by `make systemd-test`: needs root, systemd, unshare and nsenter, and a minute or two.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOCKET = "/run/holdfast/holdfast.sock"
CONFIG = """
[cluster]
name = "booted"
parity = 0
[memory]
budget = "64MiB"
chunk_bytes = "64KiB"
[[node]]
name = "a"
address = "127.77.0.1:17411"
"""

pytestmark = [
    pytest.mark.systemd,
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can boot a systemd"),
    pytest.mark.skipif(
        not Path("/lib/systemd/systemd").exists() or not all(map(shutil.which, ("unshare", "nsenter"))),
        reason="needs systemd, unshare and nsenter",
    ),
]


class Booted:
    """A running systemd with our unit."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    def run(self, *words: str, seconds: float = 60) -> str:
        """A command inside; its output."""
        inside = ["nsenter", "-t", str(self.pid), "-p", "-m", *words]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=seconds, check=False, cwd="/")
        assert done.returncode == 0, (words, done.stdout, done.stderr, self.log.read_text()[-3000:])
        return done.stdout.strip()

    def property(self, name: str) -> str:
        return self.run("systemctl", "show", "-P", name, "holdfast")

    def until(self, look: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
        deadline_s = time.monotonic() + seconds
        while not look():
            assert time.monotonic() < deadline_s, (what, self.log.read_text()[-3000:])
            time.sleep(0.2)

    def active(self, *, instead_of: str) -> None:
        """Wait until the service is ready under another main process."""
        self.until(
            lambda: self.property("ActiveState") == "active" and self.property("MainPID") not in {"0", instead_of},
            "the service is ready again",
            seconds=90,
        )

    def train(self) -> int | None:
        """One more step; what was restored before it."""
        said = json.loads(self.run(sys.executable, str(HERE / "rank.py"), SOCKET, seconds=90))
        restored: int | None = said["restored"]
        return restored


def unit(folder: Path) -> str:
    """The shipped unit, with this program and config, as root, without what needs a whole system."""
    text = (ROOT / "deploy" / "systemd" / "holdfast.service").read_text()
    program = f"{Path(sys.executable).parent}/holdfast daemon --config {folder}/cluster.toml --socket {SOCKET}"
    text = re.sub(r"^ExecStart=.*$", f"ExecStart={program}", text, flags=re.MULTILINE)
    text = re.sub(
        r"^(User|Group|SupplementaryGroups|After|Wants|ProtectHome|PrivateTmp)=.*$", "", text, flags=re.MULTILINE
    )
    text = text.replace("WatchdogSec=30s", "WatchdogSec=8s")
    text = text.replace("[Unit]", "[Unit]\nDefaultDependencies=no")
    return text.replace("[Service]", f"[Service]\nStandardError=append:{folder}/daemon.log")


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Booted]:
    (tmp_path / "cluster.toml").write_text(CONFIG)
    (tmp_path / "holdfast.service").write_text(unit(tmp_path))
    (tmp_path / "daemon.log").touch()
    with (tmp_path / "systemd.log").open("wb") as log:
        namespaces = ["--fork", "--pid", "--mount", "--cgroup", "--uts", "--ipc", "--kill-child"]
        outer = subprocess.Popen(
            ["unshare", *namespaces, str(HERE / "boot.sh"), str(tmp_path)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline_s = time.monotonic() + 20
    while not children.read_text().split():
        assert time.monotonic() < deadline_s, (tmp_path / "systemd.log").read_text()
    made = Booted(int(children.read_text().split()[0]), tmp_path / "daemon.log")
    try:
        manager = ["nsenter", "-t", str(made.pid), "-p", "-m", "systemctl", "list-units"]
        made.until(lambda: subprocess.run(manager, capture_output=True, check=False).returncode == 0, "systemd answers")
        made.run("systemctl", "start", "holdfast")
        yield made
    finally:
        os.kill(made.pid, signal.SIGKILL)  # process 1 of its namespace: everything in there ends with it
        outer.wait(20)


def test_whatever_ends_the_processes_the_snapshot_stays(booted: Booted) -> None:
    """One node without parity: whatever is restored was held by the keeper or by systemd."""
    assert booted.train() is None
    assert int(booted.property("NFileDescriptorStore")) >= 2

    main = booted.property("MainPID")
    booted.run("systemctl", "restart", "holdfast")
    booted.active(instead_of=main)
    assert booted.train() == 1

    main = booted.property("MainPID")
    booted.run("systemctl", "kill", "--signal=KILL", "holdfast")  # keeper and worker
    booted.active(instead_of=main)
    assert booted.train() == 2

    main = booted.property("MainPID")
    booted.run("systemctl", "reload", "holdfast")
    assert booted.property("MainPID") == main  # the worker was replaced, the keeper stays
    booted.until(lambda: "worker session 4" in booted.log.read_text(), "another worker took up the memory")
    assert booted.train() == 3

    booted.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "holdfast")  # hangs: the watchdog ends it
    booted.active(instead_of=main)
    assert booted.train() == 4
