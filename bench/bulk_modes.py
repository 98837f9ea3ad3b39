"""The bulk modes beside each other: how fast chunks go from one node to another as they are, and sealed.

    python bench/bulk_modes.py [--mib 64] [--rounds 7] [--quick]

Two figures, each `sealed` over `digest`, taken in turn within one run. Planes: two processes with a bulk plane each,
chunks one way over loopback, no daemon around them. Commit: two clusters of two daemons, one of each mode; a snapshot
of so many MiB staged on one node, from `step()` to COMMITTED. Beside them what sealing costs alone, on one thread.
Prints the machine, then JSON lines.
"""

import argparse
import multiprocessing as mp
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from holdfast.cli.cluster import Cluster, create, reopen
from holdfast.client import Snapshotter
from holdfast.daemon.core import events
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.shell import network
from holdfast.daemon.shell.bulk import BulkPlane, Outgoing
from holdfast.daemon.shell.sealing import Sealing
from holdfast.daemon.shell.worker import sealing_of
from holdfast.protocol import limits, messages
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.frames import BulkOffer
from holdfast.protocol.ids import SnapshotId
from references import MIB, WAIT_S, machine, say, timed

MODES = ("digest", "sealed")


def main() -> int:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description="bulk mode sealed beside digest, as JSON lines")
    parser.add_argument("--mib", type=int, default=64, help="bytes of one round, MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.mib, arguments.rounds = 8, 3
    say(machine())
    seal_alone(arguments.mib, arguments.rounds)
    with ExitStack() as stack:
        tell("chunks from plane to plane", {mode: stack.enter_context(planes(mode)) for mode in MODES}, arguments)
    with ExitStack() as stack:
        tell("step() to COMMITTED", {mode: stack.enter_context(commits(mode, arguments)) for mode in MODES}, arguments)
    return 0


def tell(what: str, ways: dict[str, Callable[[int], float]], arguments: argparse.Namespace) -> None:
    """Measure both modes in turn and say the ratio of their medians."""
    for measure in ways.values():
        measure(arguments.mib)  # memory, connections, keys
    rounds = [{mode: measure(arguments.mib) for mode, measure in ways.items()} for _ in range(arguments.rounds)]
    medians = {mode: statistics.median(found[mode] for found in rounds) for mode in ways}
    spread = {f"{mode}_{name}_s": of(found[mode] for found in rounds) for mode in ways for name, of in SPREAD.items()}
    say({
        "what": what, "ratio": medians["sealed"] / medians["digest"], "mib": arguments.mib, "rounds": arguments.rounds,
        **{f"{mode}_gb_per_s": arguments.mib * MIB / seconds / 1e9 for mode, seconds in medians.items()}, **spread,
    })  # fmt: skip


SPREAD: dict[str, Callable[[Iterator[float]], float]] = {"median": statistics.median, "min": min, "max": max}


def config_of(mode: str) -> ClusterConfig:
    """Two nodes on loopback."""
    nodes = tuple(NodeConfig(name=f"n{i}", host="127.0.0.1", port=7400 + i, domain=f"n{i}") for i in range(2))
    return ClusterConfig(cluster_name="bench", nodes=nodes, parity=1, keys_dir="/keys", bulk_mode=mode)


def seal_alone(mib: int, rounds: int) -> None:
    """Sealing and opening without any network, on this thread."""
    pair = [Sealing(config_of("sealed"), node) for node in range(2)]
    for _ in range(2):
        for me in range(2):
            pair[me].heard(1 - me, 1, pair[1 - me].offer(me))
    chunk, sealed_s, opened_s = memoryview(bytes(MIB)), [], []
    for _ in range(rounds):
        seal_s = open_s = 0.0
        for _ in range(mib):
            made: list[list[bytes]] = []
            seal_s += timed(lambda made=made: made.append(pair[0].seal(1, bytes(100), chunk)))  # type: ignore[misc]
            open_s += timed(lambda made=made: pair[1].open_second(pair[1].open_first(made[0][0]), made[0][1]))  # type: ignore[misc]
        sealed_s.append(seal_s)
        opened_s.append(open_s)
    rates = {
        f"{what}_gb_per_s": mib * MIB / statistics.median(seconds) / 1e9
        for what, seconds in (("seal", sealed_s), ("open", opened_s))
    }
    say({"what": "sealing and opening alone", **rates, "mib": mib, "rounds": rounds})


class Side:
    """One node's bulk plane in this process."""

    def __init__(self, mode: str, node: int) -> None:
        self.node, self.config = node, config_of(mode)
        self.arrived: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self.sealing = sealing_of(self.config, node)
        self.context = network.Context(io_threads=1)
        self.plane = BulkPlane(self.config, node, self.context, self.arrived.put, self.sealing)
        self.plane.start()

    def offer(self) -> tuple[int, BulkOffer | None]:
        """What the other must know."""
        return self.plane.port, None if self.sealing is None else self.sealing.offer(1 - self.node)

    def heard(self, port: int, offer: BulkOffer | None) -> None:
        """Take up what the other is."""
        self.plane.peer_port(1 - self.node, port)
        if self.sealing is not None and offer is not None:
            self.sealing.heard(1 - self.node, 1, offer)

    def close(self) -> None:
        """End the plane."""
        self.plane.stop()
        self.context.destroy(linger=0)


def introduce(side: Side, pipe: Connection) -> None:
    """Exchange ports and keys until both know that they were heard."""
    for _ in range(2):
        pipe.send(side.offer())
        side.heard(*pipe.recv())


def receiver(mode: str, pipe: Connection) -> None:
    """The other process: takes chunks, lets go of each at once, and says that it has it."""
    side = Side(mode, 1)
    introduce(side, pipe)
    while True:
        event = side.arrived.get()
        assert isinstance(event, events.ChunkArrived), event
        side.plane.drop((key_of(event.header),))
        pipe.send_bytes(b"")


@contextmanager
def planes(mode: str) -> Iterator[Callable[[int], float]]:
    """A plane here, one in another process; gives what sends so many chunks of a MiB and waits until they are there."""
    pipe, far = mp.Pipe()
    other = mp.get_context("spawn").Process(target=receiver, args=(mode, far), daemon=True)
    other.start()
    side = Side(mode, 0)
    introduce(side, pipe)
    memory = memoryview(bytearray(64 * MIB))

    def measure(chunks: int) -> float:
        started_s, sent, done = time.monotonic(), 0, 0
        while done < chunks:
            while sent < chunks and sent - done < limits.CHUNK_CREDITS:
                header = messages.ChunkHeader(
                    "bench", 1, 0, 1, "bench", SnapshotId(1, 1), 0, "data", sent, reading=False
                )
                place = sent % 64 * MIB
                side.plane.send(Outgoing(1, header, memory[place : place + MIB]))
                sent += 1
            if not pipe.poll(WAIT_S):
                raise TimeoutError(f"waited {WAIT_S} s for a chunk")
            pipe.recv_bytes()
            done += 1
        return time.monotonic() - started_s

    try:
        yield measure
    finally:
        side.close()
        other.kill()
        other.join()


@contextmanager
def commits(mode: str, arguments: argparse.Namespace) -> Iterator[Callable[[int], float]]:
    """Two daemons of a mode; gives what stages a snapshot and waits until it is committed."""
    with tempfile.TemporaryDirectory(prefix="hfb") as folder, cluster_of(Path(folder), mode) as cluster:
        cluster.start(cluster.nodes)
        cluster.wait_up()
        state = {"state": torch.ones(arguments.mib * MIB, dtype=torch.uint8)}
        steps = iter(range(1 << 30))
        with Snapshotter(state, job="bench", socket=cluster.nodes["n0"].socket, on_error="raise") as snapshotter:

            def snapshot() -> None:
                snapshotter.step(next(steps))
                snapshotter.wait(timeout_s=WAIT_S)

            yield lambda _mib: timed(snapshot)


def cluster_of(folder: Path, mode: str) -> Cluster:
    """Two nodes with parity 1, with keys."""
    made = create(folder, node_count=2, parity=1, group_size=2, memory_share=0.2, chunk_bytes=MIB)
    text = made.config_file.read_text(encoding="utf-8")
    made.config_file.write_text(text.replace("[security]", f'[security]\nbulk = "{mode}"'), encoding="utf-8")
    return reopen(folder)


if __name__ == "__main__":
    sys.exit(main())
