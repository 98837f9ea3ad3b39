"""A cluster of real daemons: started, looked at through /proc and the command line, killed, replaced.

On loopback, unless told other addresses. Covers processes only; what the daemons hold is asked from them.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

from holdfast.cli.link import Daemon
from holdfast.protocol.exit_codes import OperatorError

DEADLINE_S = 20.0  # for anything that should take a second; two busy cores
LOOK_S = 0.02

T = TypeVar("T")


def until(look: Callable[[], T], what: str, *, seconds: float = DEADLINE_S) -> T:
    """Look until something true is seen; fails with what was awaited and what was seen last."""
    deadline_s = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {seconds} s: {what}; last seen: {seen!r}")
        time.sleep(LOOK_S)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def children(pid: int) -> list[int]:
    """Child processes of a process."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def descriptors(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(str(entry.readlink()))
    return sorted(found)


def memfds(pid: int) -> list[str]:
    """Names of the memfds that a process has open."""
    return [name for name in descriptors(pid) if name.startswith("/memfd:holdfast-")]


def resident_bytes(pid: int, kind: str = "RssAnon") -> int:
    """A line of /proc/PID/status, in bytes. RssAnon is what a process holds beside the arena."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None, kind
    return int(found[1]) * 1024


class LocalCluster:
    """Daemons of one cluster. `with` ends all of them, whatever happened."""

    def __init__(
        self,
        *,
        nodes: int = 3,
        parity: int = 1,
        name: str = "test",
        epoch: int = 1,
        ports: list[int] | None = None,
        budget: str = "256MiB",
        chunk_bytes: str = "64KiB",
        keys_dir: Path | None = None,
        bulk: str = "digest",
        group_size: int = 8,
        settings: tuple[str, ...] = (),
        addresses: list[str] | None = None,
        inside: Callable[[int], list[str]] = lambda node: [],
        remote: bool = False,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hf-"))
        self.inside = inside  # what to put before a node's command, to run it somewhere else
        self.ports = ports or free_ports(nodes)
        self.remote_ports = free_ports(nodes) if remote else []  # where trainers may come in over the network
        addresses = addresses or [f"127.0.0.1:{port}" for port in self.ports]
        self.names = [f"n{index}" for index in range(nodes)]
        self.keepers: dict[int, subprocess.Popen[bytes]] = {}
        self.config = self.folder / "cluster.toml"
        lines = [
            "[cluster]", f'name = "{name}"', f"parity = {parity}", f"epoch = {epoch}", f"group_size = {group_size}",
            "[memory]", f'budget = "{budget}"', f'chunk_bytes = "{chunk_bytes}"',
        ]  # fmt: skip
        lines += settings
        if keys_dir is not None:
            lines += ["[security]", f'keys_dir = "{keys_dir}"', f'bulk = "{bulk}"']
        for node, address in zip(self.names, addresses, strict=True):
            lines += ["[[node]]", f'name = "{node}"', f'address = "{address}"']
        self.config.write_text("\n".join(lines) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in range(len(self.names)):
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- life and death ---

    def start(self, nodes: Iterable[int] | None = None, *, wait: bool = True) -> None:
        """Start nodes (default: all) and wait until each sees all others."""
        started = list(range(len(self.names)) if nodes is None else nodes)
        for node in started:
            self.spawn(node)
        if wait:
            self.wait_up()

    def spawn(self, node: int) -> None:
        """Start one node's keeper, which starts the worker."""
        worker = ["--config", str(self.config), "--node", self.names[node], "--socket", str(self.socket(node))]
        environment = dict(os.environ)
        if self.remote_ports:
            environment["HOLDFAST_TRAINERS_ADDRESS"] = f"127.0.0.1:{self.remote_ports[node]}"
        with self.log_path(node).open("ab") as log:
            self.keepers[node] = subprocess.Popen(
                [*self.inside(node), sys.executable, "-m", "holdfast.daemon.keeper", "--", *worker],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def kill(self, node: int) -> None:
        """The node is lost: keeper, worker, and with them all memory."""
        keeper = self.keepers.pop(node, None)
        deadline_s = time.monotonic() + DEADLINE_S
        # A worker brings its keeper back at once, and a keeper its worker after a pause: so workers go first.
        while left := self.processes(node):
            assert time.monotonic() < deadline_s, left
            for pid in sorted(left, key=self.is_worker, reverse=True):
                _kill(pid)
            if keeper is not None:
                keeper.poll()
        if keeper is not None:
            keeper.wait(DEADLINE_S)

    def kill_worker(self, node: int) -> int:
        """SIGKILL to the worker; returns the pid of its successor."""
        before = self.worker(node)
        _kill(before)
        return until(
            lambda: next((pid for pid in self.processes(node) if pid != before and self.is_worker(pid)), 0),
            f"a new worker of node {node}",
        )

    def signal_worker(self, node: int, number: int) -> None:
        """Send a signal to the worker."""
        os.kill(self.worker(node), number)

    # --- who is there ---

    def processes(self, node: int) -> list[int]:
        """Keepers and workers of a node, wherever they hang: those with its socket on their command line."""
        mark = str(self.socket(node)).encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if (
                    mark in words
                    and any(word.startswith(b"holdfast.daemon.") for word in words)
                    and alive(int(entry.name))
                ):
                    found.append(int(entry.name))
        return sorted(found)

    @staticmethod
    def is_worker(pid: int) -> bool:
        """Whether a process of ours is a worker."""
        try:
            return b"holdfast.daemon.shell.worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False

    def worker(self, node: int) -> int:
        """The worker's pid."""
        return until(lambda: next((p for p in self.processes(node) if self.is_worker(p)), 0), f"worker of node {node}")

    def keeper(self, node: int) -> int:
        """The keeper's pid."""
        return until(
            lambda: next((p for p in self.processes(node) if not self.is_worker(p)), 0), f"keeper of node {node}"
        )

    # --- what they say ---

    def socket(self, node: int) -> Path:
        """The node's Unix socket."""
        return self.folder / f"{self.names[node]}.sock"

    def remote(self, node: int) -> str:
        """Where trainers of another host, or that see none of this one's sockets, find the node."""
        return f"tcp://{self.names[node]}@127.0.0.1:{self.remote_ports[node]}"

    def log_path(self, node: int) -> Path:
        """The node's log."""
        return self.folder / f"{self.names[node]}.log"

    def log(self, node: int) -> str:
        """What the node has logged."""
        return self.log_path(node).read_text(errors="replace")

    def wait_log(self, node: int, text: str) -> str:
        """Wait until a node has logged something; returns that line."""
        return until(
            lambda: next((line for line in self.log(node).splitlines() if text in line), ""), f"log of {text!r}"
        )

    def status(self, node: int = 0) -> dict[str, Any]:
        """The status as a node tells it."""
        with Daemon(self.socket(node)) as daemon:
            return daemon.status()

    def try_status(self, node: int = 0) -> dict[str, Any] | None:
        """The status, None if the daemon does not answer."""
        try:
            return self.status(node)
        except OperatorError:
            return None

    def wait_status(self, good: Callable[[dict[str, Any]], bool], what: str, *, node: int = 0) -> dict[str, Any]:
        """Wait until a node's status is as wanted; returns it."""
        last: dict[str, Any] = {}

        def look() -> dict[str, Any] | None:
            nonlocal last
            last = self.try_status(node) or {}
            return last if last and good(last) else None

        try:
            return until(look, what) or {}
        except AssertionError as error:
            raise AssertionError(f"{error}; status: {last}; log: {self.log(node)[-2000:]}") from None

    def wait_up(self) -> None:
        """Wait until every running node sees every other."""
        for node in sorted(self.keepers):
            self.wait_status(lambda status: all(row["state"] == "up" for row in status["nodes"]), "all up", node=node)

    def command(self, *words: str, node: int = 0, seconds: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
        """Run `holdfast WORDS` against a node's daemon."""
        environment = {**os.environ, "HOLDFAST_SOCKET": str(self.socket(node))}
        return subprocess.run(
            [sys.executable, "-m", "holdfast.cli.main", *words],
            env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip

    def forget(self, job: str) -> None:
        """Free a job everywhere and wait until no node knows it."""
        with Daemon(self.socket(0)) as daemon:
            daemon.forget(job)
        for node in sorted(self.keepers):
            self.wait_status(lambda s: job not in [row["name"] for row in s["jobs"]], f"{job} forgotten", node=node)


def job_row(status: dict[str, Any], job: str) -> dict[str, Any]:
    """A job's row of a status; empty if the job is not known."""
    return next((row for row in status["jobs"] if row["name"] == job), {})


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
