"""A real Slurm on this machine: munged, slurmctld and several slurmd, in a folder of its own; and how a node is lost.

Needs root and Debian's slurm-wlm and munge. No systemd, no cgroups: processes are tracked by their ancestry.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

SETTINGS = """
ClusterName=holdfasttest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=30
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=15
KillWait=5
InactiveLimit=0
MinJobAge=300
JobRequeue=1
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=16 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def until(look: Callable[[], object], what: str, *, seconds: float) -> None:
    """Look until something is so; fails with what was awaited."""
    deadline_s = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline_s, f"not within {seconds} s: {what}"
        time.sleep(0.1)


class SlurmCluster:
    """`with` ends everything that it started, and what that started."""

    def __init__(self, folder: Path, *, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.mark = f"SLURM_CONF={folder}/slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.chmod(0o755)
        munge = self.folder / "munge"
        munge.mkdir()
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        (self.folder / "state").mkdir()
        ports = _free_ports(self.nodes + 1)
        for name in (f"n{number + 1}" for number in range(self.nodes)):
            (self.folder / f"spool.{name}").mkdir()
        text = SETTINGS.format(
            host=socket.gethostname().partition(".")[0], folder=self.folder, nodes=self.nodes, port=ports[0],
            first=ports[1], last=ports[-1],
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={munge}/key",
                    f"--socket={self.folder}/munge.socket", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
                    f"--log-file={munge}/log")  # fmt: skip
        until((self.folder / "munge.socket").exists, "munged listens", seconds=20)
        self._start("slurmctld", "slurmctld", "-D")
        for number in range(self.nodes):
            self._start(f"n{number + 1}", "slurmd", "-D", "-N", f"n{number + 1}")
        until(
            lambda: self.command("sinfo", "-h", "-o", "%T %D").strip() == f"idle {self.nodes}", "all idle", seconds=60
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline_s = time.monotonic() + 20
        while left := [pid for pid, environment in _processes() if self.mark in environment]:
            assert time.monotonic() < deadline_s, left
            for pid in left:
                _kill(pid)
            time.sleep(0.05)
        for process in self._started.values():
            process.wait(20)

    def _start(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None, command[0]
        with (self.folder / f"{name}.out").open("wb") as log:
            self._started[name] = subprocess.Popen(
                [program, *command[1:]], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=self.folder,
            )  # fmt: skip

    def command(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands; its output, empty if it failed."""
        done = subprocess.run(
            words, env={**self.environment, **(environment or {})}, capture_output=True, text=True, timeout=60,
            check=False, cwd=self.folder,
        )  # fmt: skip
        return done.stdout if done.returncode == 0 else ""

    def lose(self, name: str) -> None:
        """The power of a node fails: its slurmd, the step daemons and all tasks on it, at once."""
        victims = {self._started[name].pid}
        for pid, environment in _processes():
            if self.mark in environment and f"SLURMD_NODENAME={name}" in environment:
                victims |= {pid, *(one for one in _ancestors(pid) if _name(one).startswith("slurmstepd"))}
        for _ in range(3):  # one that was just being started
            for pid in victims:
                _kill(pid)
            victims |= {pid for pid, text in _processes() if self.mark in text and f"SLURMD_NODENAME={name}" in text}


def _processes() -> Iterator[tuple[int, list[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                yield int(entry.name), (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return
        yield pid


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_ports(count: int) -> list[int]:
    """Consecutive ports: Slurm's config wants a range of them."""
    for first in range(21000, 30000, count):
        sockets = []
        try:
            sockets.extend(socket.create_server(("127.0.0.1", port)) for port in range(first, first + count))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no consecutive free ports")
