"""Rebuild of lost nodes, beside the lost bytes over one raw TCP connection between the same ends.

    python bench/recovery.py [--nodes 8 --parity 2] [--mib 64] [--lost 1] [--gbytes-per-s 0.25] [--rounds 3]

Real daemons with keys. With --gbytes-per-s each node lives in a network namespace of its own behind a link of that
rate, both ways (needs root, ip and tc); without it all share loopback, where all survivors' work adds up.
Staged by this process for all ranks, without torch. Prints the machine, then JSON lines. Seconds of a rebuild are the
replacement's own: from its decision to rebuild until the snapshot is whole. `received` is what it counted.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from holdfast.cli import processes
from holdfast.cli.cluster import free_addresses
from holdfast.cli.keys import write_keys
from holdfast.cli.link import Daemon
from holdfast.client.link import Link
from holdfast.protocol import messages
from holdfast.protocol.exit_codes import OperatorError
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace
from namespaces import Namespaces
from references import MIB, machine, ratio, say, wait_for

JOB = "bench"
ANSWER_S = 60.0
BURST_BYTES = 1 << 20  # of a shaped link: what it lets through at once
_RECEIVE = """
import socket, sys, time
with socket.create_server(("", int(sys.argv[1]))) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    buffer, left, started = memoryview(bytearray(1 << 20)), int(sys.argv[2]), time.monotonic()
    while left > 0:
        left -= connection.recv_into(buffer)
    print(time.monotonic() - started)
"""
_SEND = """
import socket, sys
block, left = memoryview(bytes(1 << 20)), int(sys.argv[3])
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    while left > 0:
        left -= connection.send(block[: min(left, len(block))])
"""


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description="rebuild of lost nodes beside raw TCP, as JSON lines")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--parity", type=int, default=2)
    parser.add_argument("--mib", type=int, default=64, help="image of one node, MiB")
    parser.add_argument("--chunk-kib", type=int, default=1024)
    parser.add_argument("--lost", type=int, default=1, help="nodes lost at once")
    parser.add_argument("--gbytes-per-s", type=float, help="rate of each node's link; default: loopback, unshaped")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    say(machine())
    with tempfile.TemporaryDirectory(prefix="hfr") as folder:
        network: Network = Shaped(arguments) if arguments.gbytes_per_s else Network(arguments)
        lab = Lab(Path(folder), network, arguments)
        try:
            network.make()
            lab.start(range(arguments.nodes))
            lab.stage()
            for _ in range(arguments.rounds):
                lab.lose_and_rebuild()
            lab.tell()
        finally:
            lab.stop()
            network.remove()
    return 0


class Network:
    """All nodes on loopback."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.addresses = list(free_addresses(arguments.nodes))

    def make(self) -> None:
        """Nothing to make."""

    def remove(self) -> None:
        """Nothing to remove."""

    def inside(self, node: int) -> list[str]:
        """What to put before a command that runs on a node."""
        del node
        return []


class Shaped(Network):
    """Each node in a network namespace, behind a link of a fixed rate, all on one bridge."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.spaces = Namespaces(arguments.nodes, burst_bytes=BURST_BYTES)
        self.addresses = self.spaces.addresses

    def make(self) -> None:
        """Make the bridge and the namespaces."""
        self.spaces.make()
        for node in range(self.arguments.nodes):
            self.spaces.slow(node, self.arguments.gbytes_per_s * 1e9)

    def remove(self) -> None:
        """Remove all of it."""
        self.spaces.remove()

    def inside(self, node: int) -> list[str]:
        """Run in the node's namespace."""
        return self.spaces.inside(node)


class Lab:
    """A cluster of real daemons, and a job that this process stages for."""

    def __init__(self, folder: Path, network: Network, arguments: argparse.Namespace) -> None:
        self.folder, self.network, self.arguments = folder, network, arguments
        self.names = [f"n{node}" for node in range(arguments.nodes)]
        self.daemons: dict[int, subprocess.Popen[bytes]] = {}
        self.rebuild_s: list[float] = []
        self.wire_s: list[float] = []
        self.received: list[float] = []
        self.lost_bytes = 0
        write_keys(folder / "keys", self.names)
        lines = [
            "[cluster]", 'name = "recovery"', f"parity = {arguments.parity}", f"group_size = {arguments.nodes}",
            "[memory]", f'budget = "{arguments.mib * 5}MiB"', f'chunk_bytes = "{arguments.chunk_kib}KiB"',
            "[security]", f'keys_dir = "{folder / "keys"}"',
        ]  # fmt: skip
        for name, address in zip(self.names, network.addresses, strict=True):
            lines += ["[[node]]", f'name = "{name}"', f'address = "{address}"']
        self.config = folder / "cluster.toml"
        self.config.write_text("\n".join(lines) + "\n")

    def socket(self, node: int) -> Path:
        """A node's Unix socket."""
        return self.folder / f"{self.names[node]}.sock"

    def start(self, nodes: Iterable[int]) -> None:
        """Start nodes and wait until each sees all others."""
        for node in nodes:
            words = ["daemon", "--config", str(self.config), "--node", self.names[node]]
            command = [*self.network.inside(node), sys.executable, "-m", "holdfast.cli.main", *words]
            with (self.folder / f"{self.names[node]}.log").open("ab") as log:
                self.daemons[node] = subprocess.Popen(
                    [*command, "--socket", str(self.socket(node))], stdout=log, stderr=log, start_new_session=True
                )
        wait_for(lambda: all(self._sees_all(node) for node in self.daemons), "all nodes to be up", look_s=0.1)

    def _sees_all(self, node: int) -> bool:
        status = self.status(node)
        return status is not None and all(row["state"] == "up" for row in status["nodes"])

    def status(self, node: int) -> dict[str, Any] | None:
        """The status as a node tells it."""
        try:
            with Daemon(self.socket(node)) as daemon:
                return daemon.status()
        except OperatorError:
            return None

    def stop(self) -> None:
        """End all daemons, keepers and workers."""
        for node in list(self.daemons):
            self.kill(node)

    def kill(self, node: int) -> None:
        """A node is gone with its memory."""
        daemon = self.daemons.pop(node)
        processes.kill_all_using(self.socket(node))  # the daemon, its keeper and its worker
        daemon.wait()

    def stage(self) -> None:
        """Stage and commit one step of every node's image."""
        shards = tuple(ShardPlace(node, self.arguments.mib * MIB) for node in range(self.arguments.nodes))
        layout = Layout(shards, 0, 1)
        wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        links = [Link(self.socket(node), wake_fd=wake_fd) for node in range(self.arguments.nodes)]
        links[0].send(messages.AskRestore(JOB))
        self._until(links[0], lambda: links[0].session.restore_answer is not None)
        answer = links[0].session.restore_answer
        assert answer is not None
        snapshot = SnapshotId(answer.attempt, 0)
        for role, link in enumerate(links):
            self._plan(link, messages.Plan(JOB, answer.attempt, role, layout))
        for role, link in enumerate(links):
            link.send(messages.Begin(JOB, snapshot, role))
            self._until(link, lambda link=link: snapshot in link.session.granted)  # type: ignore[misc]
            granted = link.session.granted[snapshot]
            self._until(link, lambda link=link, g=granted: link.memory(JOB, g.slot, g.generation) is not None)  # type: ignore[misc]
            memory = link.memory(JOB, granted.slot, granted.generation)
            assert memory is not None
            for start in range(0, self.arguments.mib * MIB, MIB):
                memory[start : start + MIB] = os.urandom(MIB)
            link.send(messages.Seal(JOB, snapshot, role))
        for link in links:
            self._until(link, lambda link=link: link.session.progress.committed == snapshot)  # type: ignore[misc]
            link.close()

    def _plan(self, link: Link, plan: messages.Plan) -> None:
        while link.session.accepted is None:
            link.session.ask("Plan")
            link.send(plan)
            self._until(link, lambda: link.session.accepted is not None or "Plan" in link.session.denied)

    def _until(self, link: Link, done: Callable[[], bool]) -> None:
        if not link.until(done, deadline_s=time.monotonic() + ANSWER_S):
            raise TimeoutError(f"the daemon on {link.path} did not answer within {ANSWER_S} s")

    def lose_and_rebuild(self) -> None:
        """Lose nodes, start replacements, wait until they are whole; then the same bytes over one connection."""
        lost = range(1, 1 + self.arguments.lost)
        for node in lost:
            self.kill(node)
        self.start(lost)
        wait_for(lambda: all(self.entry(node)["whole"] for node in lost), "the rebuild", look_s=0.05)
        for node in lost:
            entry = self.entry(node)
            self.rebuild_s.append(entry["rebuild_s"])
            self.lost_bytes = self._lost_bytes()
            self.received.append(entry["received_bytes"] / self.lost_bytes)
        self.wire_s.append(self.wire(self.lost_bytes))

    def entry(self, node: int) -> dict[str, Any]:
        """What a status says of the job on a node; nothing, not whole, where it does not know it."""
        status = self.status(node)
        row = status["nodes"][node] if status is not None else {"jobs": {}}
        empty = {"whole": False, "rebuild": "", "rebuild_s": 0.0, "received_bytes": 0}
        entry: dict[str, Any] = row["jobs"].get(JOB, empty)
        return {**entry, "whole": entry["whole"] and entry["rebuild"] == "done"}

    def _lost_bytes(self) -> int:
        """The image and its share of the parity, in whole chunks; images are equal."""
        return int(
            self.arguments.mib * MIB * (1 + self.arguments.parity / (self.arguments.nodes - self.arguments.parity))
        )

    def wire(self, size_bytes: int) -> float:
        """Seconds of so many bytes over one TCP connection from the last node to a lost one."""
        source, port = self.arguments.nodes - 1, free_addresses(1)[0].rpartition(":")[2]
        host = self.network.addresses[1].rpartition(":")[0]
        receive = [*self.network.inside(1), sys.executable, "-c", _RECEIVE, port, str(size_bytes)]
        with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None
            receiver.stdout.readline()
            _run(*self.network.inside(source), sys.executable, "-c", _SEND, host, port, str(size_bytes))
            return float(receiver.stdout.readline())

    def tell(self) -> None:
        """The figures."""
        goal = 1.5 if self.arguments.lost == 1 else 1.7
        names = ("nodes", "parity", "mib", "chunk_kib", "lost", "gbytes_per_s", "rounds")
        common = {name: getattr(self.arguments, name) for name in names}
        figure = ratio("rebuild, per lost node", self.rebuild_s, self.wire_s, goal=goal)
        rate = self.lost_bytes / 1e9 / float(str(figure["seconds"]))
        say(
            {
                **figure,
                "lost_bytes": self.lost_bytes,
                "gbytes_per_s_rebuilt": rate,
                "load": os.getloadavg()[0],
                **common,
            }
        )
        most = max(self.received)
        say({"what": "received per lost byte", "ratio": most, "goal": 1.1, "met": most <= 1.1, **common})


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
