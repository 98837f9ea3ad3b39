"""A cluster of real daemons on this machine: its files, addresses and processes, and how they are killed.

Covers what `holdfast local` and `holdfast demo` share. Each node is a keeper (which starts the worker) in a process
session of its own, with a Unix socket and a log in its folder and a TCP address of its own on loopback.
"""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from holdfast.cli import processes
from holdfast.cli.daemon import keeper_command
from holdfast.cli.keys import write_keys
from holdfast.cli.link import Daemon
from holdfast.protocol.config import ClusterConfig, parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.settings import ENVIRONMENT_PREFIX, format_bytes

UP_S = 30.0  # from the start of the processes until each daemon answers and sees all others; 2 s on idle cores
STOP_S = 10.0  # a daemon asked to stop is killed after so long
ASK_AGAIN_S = 1.0  # between two requests to stop
LOOK_S = 0.1  # between two looks while waiting
SOCKET_PATH_BYTES_MAX = 100  # the kernel allows 107, and the daemon adds a suffix of four
LOG_LINES_SHOWN = 15
CONFIG_NAME, SOCKET_NAME, LOG_NAME, KEYS_NAME = "cluster.toml", "holdfast.sock", "daemon.log", "keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFiles:
    """Where one node of a local cluster is.

    Attributes:
        name: its name in the config.
        address: host:port of its control plane.
        socket: its Unix socket.
        log: what its keeper and workers write to standard error, appended over restarts.
    """

    name: str
    address: str
    socket: Path
    log: Path


class Cluster:
    """The daemons of one config file. `with` ends all of them, whatever happened."""

    def __init__(self, folder: Path, config: ClusterConfig) -> None:
        self.folder, self.config = folder, config
        self.nodes = {
            node.name: NodeFiles(
                name=node.name,
                address=node.address,
                socket=folder / node.name / SOCKET_NAME,
                log=folder / node.name / LOG_NAME,
            )
            for node in config.nodes
        }
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(self.nodes)

    @property
    def config_file(self) -> Path:
        """The config that all nodes share."""
        return self.folder / CONFIG_NAME

    @property
    def sockets(self) -> str:
        """All nodes' sockets as HOLDFAST_SOCKET takes them: rank i of a launcher uses entry i modulo their count."""
        return ",".join(str(node.socket) for node in self.nodes.values())

    # --- life and death ---

    def start(self, names: Iterable[str]) -> None:
        """Start the keepers of these nodes; returns at once. A node that was killed starts with empty memory."""
        for name in names:
            node = self.nodes[name]
            node.log.parent.mkdir(mode=0o700, exist_ok=True)
            with node.log.open("ab") as log:
                self._keepers[name] = subprocess.Popen(
                    keeper_command(self.config_file, name, node.socket),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,  # whatever folder we were started in may go away
                    env=clean_environment(),
                    start_new_session=True,
                )

    def wait_up(self, *, on_look: Callable[[], None] = lambda: None) -> None:
        """Wait until every daemon answers and the first sees all others.

        Raises:
            OperatorError: one ended (with its exit code), or it takes longer than `UP_S`; with the end of a log.
        """
        deadline_s = time.monotonic() + UP_S
        missing = list(self.nodes)
        while missing:
            on_look()
            self.refuse_ended()
            if time.monotonic() > deadline_s:
                raise OperatorError(
                    ExitCode.UNREACHABLE,
                    f"expected {', '.join(missing)} to be up within {UP_S} s, found no answer or no word of the others;"
                    f" {self.log_hint(missing[0])}",
                )
            time.sleep(LOOK_S)
            missing = [name for name in missing if not self._sees_all(name)]

    def _sees_all(self, name: str) -> bool:
        try:
            status = self.status(name)
        except OperatorError:
            return False  # not yet
        return all(node["state"] == "up" for node in status["nodes"])

    def refuse_ended(self) -> None:
        """Raises OperatorError if a keeper that should run has ended for good."""
        for name, code in self.ended().items():
            known = ExitCode(code) if code in {2, 4, 5, 7} else ExitCode.BUG
            raise OperatorError(known, f"the daemon of node {name} ended with status {code}; {self.log_hint(name)}")

    def ended(self) -> dict[str, int]:
        """The nodes whose keeper ended though nobody stopped it, and its exit status."""
        found = {}
        for name, keeper in self._keepers.items():
            # A keeper that was killed is brought back by its worker, as another process.
            if keeper.poll() is not None and not processes.using(self.nodes[name].socket):
                found[name] = keeper.returncode
        return found

    def stop(self) -> list[str]:
        """Ask every daemon to stop, as an operator would. Returns the names of those that had to be killed."""
        deadline_s, asked_s = time.monotonic() + STOP_S, float("-inf")
        left = list(self._keepers)
        while left and time.monotonic() < deadline_s:
            if time.monotonic() > asked_s + ASK_AGAIN_S:  # a keeper that was just brought back may have missed it
                asked_s = time.monotonic()
                for name in left:
                    self._signal(name, signal.SIGTERM)
            left = [name for name in left if processes.using(self.nodes[name].socket)]
            for name in set(self._keepers) - set(left):
                self._keepers.pop(name).wait(STOP_S)
            time.sleep(LOOK_S / 5)
        self.kill(left)
        return left

    def _signal(self, name: str, number: int) -> None:
        for pid in processes.using(self.nodes[name].socket):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self, names: Iterable[str]) -> None:
        """These nodes are lost: SIGKILL to keeper and worker, and with them goes all memory that they held."""
        for name in names:  # all at once first, so that none of several has time to react to another's death
            keeper = self._keepers.get(name)
            if keeper is not None and keeper.poll() is None:
                os.killpg(keeper.pid, signal.SIGKILL)
        for name in list(names):
            left = processes.kill_all_using(self.nodes[name].socket)
            keeper = self._keepers.pop(name, None)
            if keeper is not None:
                keeper.wait(STOP_S)
            if left:
                raise OperatorError(ExitCode.BUG, f"processes {left} of node {name} do not end; kill them by hand")

    def keeper_pid(self, name: str) -> int:
        """The process that `start` made for a node."""
        return self._keepers[name].pid

    def worker_pids(self, name: str) -> list[int]:
        """The worker that a node's keeper runs now: one process, or none for a moment after a death."""
        return processes.children(self.keeper_pid(name))

    # --- questions ---

    def status(self, name: str | None = None) -> dict[str, Any]:
        """The cluster's status as one node's daemon sees it (default: the first that runs). Schema holdfast.status/1.

        Raises:
            OperatorError: no answer (daemon unreachable).
        """
        asked = name or next(iter(self._keepers), next(iter(self.nodes)))
        with Daemon(self.nodes[asked].socket) as daemon:
            return daemon.status()

    def log_hint(self, name: str) -> str:
        """The last lines of a node's log, for an error text."""
        return tail(self.nodes[name].log)


def create(
    folder: Path, *, node_count: int, parity: int, group_size: int, memory_share: float, chunk_bytes: int
) -> Cluster:
    """Write a cluster's config and keys into an empty folder. Nodes are n0, n1, and so on.

    Args:
        folder: must exist; short enough for the nodes' sockets.
        node_count: at least 1.
        parity: as in the config.
        group_size: as in the config.
        memory_share: of the machine's free memory, shared equally by the nodes.
        chunk_bytes: the unit of coding and transfer.

    Raises:
        OperatorError: the config is refused, or the folder's path is too long (exit code 2).
    """
    names = [f"n{index}" for index in range(node_count)]
    refuse_long_path(folder / names[-1] / SOCKET_NAME)
    budget_bytes = int(available_bytes() * memory_share) // node_count
    lines = [
        "# Made by holdfast for a cluster on one machine.",
        "[cluster]",
        f'name = "local-{secrets.token_hex(4)}"',
        f"parity = {parity}",
        f"group_size = {group_size}",
        "[memory]",
        f'budget = "{budget_bytes >> 20}MiB"  # {memory_share:.0%} of the free memory, over {node_count} nodes',
        f'chunk_bytes = "{format_bytes(chunk_bytes)}"',
        "[security]",
        f'keys_dir = "{folder / KEYS_NAME}"',
    ]
    for name, address in zip(names, free_addresses(node_count), strict=True):
        lines += ["[[node]]", f'name = "{name}"', f'address = "{address}"']
    text = "\n".join(lines) + "\n"
    config = parse_config(text, origin=str(folder / CONFIG_NAME), environment={}).config
    write_keys(folder / KEYS_NAME, names)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return Cluster(folder, config)


def reopen(folder: Path) -> Cluster:
    """The cluster that an earlier `create` left in a folder.

    Raises:
        OperatorError: its config is refused or can't be read (exit code 2).
    """
    file = folder / CONFIG_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(ExitCode.USAGE, f"can't read {file}: {error}; give --dir another folder") from error
    config = parse_config(text, origin=str(file), environment={}).config
    refuse_long_path(folder / config.nodes[-1].name / SOCKET_NAME)
    return Cluster(folder, config)


def refuse_long_path(path: Path) -> None:
    """Raises OperatorError if a Unix socket can't have this path."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise OperatorError(
            ExitCode.USAGE,
            f"the socket's path {path} has {length} bytes, the kernel allows {SOCKET_PATH_BYTES_MAX}; "
            "choose a shorter folder with --dir or TMPDIR",
        )


def clean_environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would reconfigure our daemons, and with `added`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return {**kept, **(added or {})}


def free_addresses(count: int) -> list[str]:
    """Addresses "host:port" on loopback that nobody uses.

    The host is a random one of 127.0.0.0/8, so that no other cluster, and no outgoing connection of anybody (those
    leave from 127.0.0.1), takes a port between our look and the daemon's start, or while a killed node is away.
    """
    host = ".".join(["127", *(str(1 + secrets.randbelow(254)) for _ in range(3))])
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError:  # a sandbox with one loopback address only
            host = "127.0.0.1"
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((host, 0))
        return [f"{host}:{one.getsockname()[1]}" for one in sockets]
    finally:
        for one in sockets:
            one.close()


def available_bytes() -> int:
    """Memory of this machine that can be had without swapping, in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OperatorError(ExitCode.BUG, "expected a line MemAvailable in /proc/meminfo, found none")


def tail(log: Path) -> str:
    """The last lines of a log, introduced, for an error text."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    except OSError as error:
        return f"its log {log} can't be read ({error.strerror})"
    return f"the end of {log}:\n" + "\n".join(f"  {line}" for line in lines)
