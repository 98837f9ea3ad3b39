"""The faults of a chaos run: each happens, is said, and is over when its function returns.

A fault takes the turn's own random generator, and nothing that depends on time, so that a seed gives the same faults
again. It returns what it did in words, and whether parity covers it. Links need namespaces; without, `menu` leaves
those faults out.
"""

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import Job
from local_cluster import LocalCluster, until
from namespaces import Namespaces

DURATIONS_S = (0.3, 1.0, 2.0, 4.0, 8.0)  # below and above what is taken for death: 2.5 s
RATES_BYTES_PER_S = (300e3, 1e6, 4e6, 16e6)  # of a slow link
FILLER_ELEMENTS = 3 << 20  # 24 MiB of state: a job that takes most of the budget
GREEDY_ELEMENTS = 20 << 20  # 160 MiB of state: more than any budget here
ROOM_BYTES = 8 << 20  # of address space that a worker is left with: less than the filler's slot

Fault = Callable[[random.Random], tuple[str, bool]]


@dataclass
class Faults:
    """All of them, on one cluster."""

    cluster: LocalCluster
    spaces: Namespaces | None
    slows: bool  # whether this kernel can slow links
    parity: int
    jobs: list[Job]

    def menu(self) -> list[Fault]:
        """What is drawn from; what stands there twice is drawn twice as often."""
        faults: list[Fault] = [
            self.worker_killed, self.worker_killed, self.worker_restarted, self.keeper_killed, self.worker_frozen,
            self.rank_killed, self.rank_frozen, self.nodes_lost, self.nodes_lost, self.data_flipped, self.data_flipped,
            self.parity_flipped, self.too_many_lost, self.memory_full, self.allocation_refused,
        ]  # fmt: skip
        if self.spaces is not None:
            faults += [self.link_unplugged, self.link_cut, self.link_cut_one_way, self.link_cut_one_way,
                       self.partition, self.link_flapping]  # fmt: skip
            faults += [self.link_slowed, self.link_slowed] if self.slows else []
        return faults

    @property
    def nodes(self) -> list[int]:
        return list(range(len(self.cluster.names)))

    # --- processes ---

    def worker_killed(self, draw: random.Random) -> tuple[str, bool]:
        """SIGKILL to a worker, perhaps again while its successor begins."""
        node, times = draw.choice(self.nodes), draw.choice([1, 1, 2])
        for _ in range(times):
            self.cluster.kill_worker(node)
        return f"n{node}, {times} times", True

    def worker_restarted(self, draw: random.Random) -> tuple[str, bool]:
        """SIGHUP: what `holdfast upgrade` sends."""
        node = draw.choice(self.nodes)
        before = self.cluster.worker(node)
        os.kill(before, signal.SIGHUP)
        until(lambda: any(pid != before and self.cluster.is_worker(pid) for pid in self.cluster.processes(node)),
              f"a new worker of n{node}")  # fmt: skip
        return f"n{node}", True

    def keeper_killed(self, draw: random.Random) -> tuple[str, bool]:
        """SIGKILL to a keeper: its worker brings another."""
        node = draw.choice(self.nodes)
        before = self.cluster.keeper(node)
        os.kill(before, signal.SIGKILL)
        if before == self.cluster.keepers[node].pid:
            self.cluster.keepers[node].wait(20)
        until(lambda: [p for p in self.cluster.processes(node) if p != before and not self.cluster.is_worker(p)],
              f"a new keeper of n{node}")  # fmt: skip
        return f"n{node}", True

    def worker_frozen(self, draw: random.Random) -> tuple[str, bool]:
        """SIGSTOP to a worker for a while."""
        node, seconds = draw.choice(self.nodes), draw.choice(DURATIONS_S)
        pid = self.cluster.worker(node)
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)
        return f"n{node} for {seconds} s", True

    def rank_killed(self, draw: random.Random) -> tuple[str, bool]:
        """SIGKILL to a rank in the middle of what it does."""
        job = self.jobs[0]
        rank = draw.randrange(len(job.nodes))
        job.kill(rank)
        return f"rank {rank} of {job.name}", True

    def rank_frozen(self, draw: random.Random) -> tuple[str, bool]:
        """SIGSTOP to a rank for a while."""
        job = draw.choice(self.jobs)
        rank, seconds = draw.randrange(len(job.nodes)), draw.choice(DURATIONS_S)
        with job.frozen(rank):
            time.sleep(seconds)
        return f"rank {rank} of {job.name} for {seconds} s", True

    # --- nodes and memory ---

    def nodes_lost(self, draw: random.Random) -> tuple[str, bool]:
        """As many nodes as parity covers, at once."""
        return self._lose(draw, draw.randint(1, self.parity)), True

    def too_many_lost(self, draw: random.Random) -> tuple[str, bool]:
        """More than parity covers."""
        return self._lose(draw, draw.randint(self.parity + 1, len(self.nodes))), False

    def _lose(self, draw: random.Random, count: int) -> str:
        lost, pause_s = draw.sample(self.nodes, count), draw.choice([0.0, 0.0, 0.3, 4.0])
        for node in lost:
            self.cluster.kill(node)
        time.sleep(pause_s)
        for node in lost:
            self.cluster.spawn(node)
        return f"{', '.join(f'n{node}' for node in lost)}, back after {pause_s} s"

    def data_flipped(self, draw: random.Random) -> tuple[str, bool]:
        """A bit of each piece of data that a node holds, while nothing is in flight."""
        return self._flip(draw, "data")

    def parity_flipped(self, draw: random.Random) -> tuple[str, bool]:
        """A bit of each piece of parity, and of the digests beside it."""
        return self._flip(draw, "guard")

    def _flip(self, draw: random.Random, part: str) -> tuple[str, bool]:
        for job in self.jobs:
            job.hold()
        node, hit = draw.choice(self.nodes), set()
        for entry in Path(f"/proc/{self.cluster.worker(node)}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                inode = entry.stat().st_ino
                if f"/memfd:holdfast-{part}" in str(entry.readlink()) and inode not in hit:
                    hit.add(inode)
                    flip(entry, draw)
        assert hit, f"n{node} has ranks and holds no {part}"
        return f"n{node}, {len(hit)} pieces", True

    def memory_full(self, draw: random.Random) -> tuple[str, bool]:
        """A job takes most of the budget, one that would exceed it is refused, and the others go on."""
        node = draw.choice(self.nodes)
        with self._extra("filler", node, FILLER_ELEMENTS) as filler:
            filler.begin()
            filler.commits()
            with self._extra("greedy", node, GREEDY_ELEMENTS) as greedy:
                greedy.begin()
                until(lambda: greedy.refused() or greedy.told_committed() >= 0, "an answer to a greedy job")
                assert greedy.told_committed() < 0, "a job over the budget commits"
                for job in self.jobs:
                    job.commits()
        return f"n{node}", True

    def allocation_refused(self, draw: random.Random) -> tuple[str, bool]:
        """The kernel gives a worker no more memory while a job attaches."""
        node = draw.choice(self.nodes)
        worker = self.cluster.worker(node)
        size_pages = int(Path(f"/proc/{worker}/statm").read_text().split()[0])
        unlimited = resource.prlimit(worker, resource.RLIMIT_AS)
        resource.prlimit(worker, resource.RLIMIT_AS, (size_pages * resource.getpagesize() + ROOM_BYTES, unlimited[1]))
        try:
            with self._extra("filler", node, FILLER_ELEMENTS) as filler:
                filler.begin()
                until(lambda: filler.refused() or filler.told_committed() >= 0, "an answer to a job without memory")
                for job in self.jobs:
                    job.commits()
        finally:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(worker, resource.RLIMIT_AS, unlimited)
        return f"n{node}", True

    @contextlib.contextmanager
    def _extra(self, name: str, node: int, size: int) -> Iterator[Job]:
        job = Job(name, (node,), self.cluster.folder, [self.cluster.socket(n) for n in self.nodes], size=size)
        try:
            yield job
        finally:
            job.end()
            self.cluster.forget(name)

    # --- links ---

    def link_unplugged(self, draw: random.Random) -> tuple[str, bool]:
        """A node's link is down for a while."""
        node, seconds = draw.choice(self.nodes), draw.choice(DURATIONS_S)
        with self._unplugged(node):
            time.sleep(seconds)
        return f"n{node} for {seconds} s", True

    def link_flapping(self, draw: random.Random) -> tuple[str, bool]:
        """A node's link goes down and up, several times."""
        node, times = draw.choice(self.nodes), draw.randint(2, 6)
        for _ in range(times):
            with self._unplugged(node):
                time.sleep(draw.choice([0.1, 0.5, 3.0]))
            time.sleep(draw.choice([0.1, 0.5]))
        return f"n{node}, {times} times", True

    def link_cut(self, draw: random.Random) -> tuple[str, bool]:
        """Nothing arrives between two nodes, in either direction; all others reach both."""
        one, other = draw.sample(self.nodes, 2)
        return self._cut(draw, [(one, other), (other, one)], f"n{one} - n{other}")

    def link_cut_one_way(self, draw: random.Random) -> tuple[str, bool]:
        """Nothing arrives from one node at another, or at any other."""
        one, *others = draw.sample(self.nodes, len(self.nodes))
        others = others[: draw.choice([1, len(others)])]
        pairs = [(one, other) for other in others]
        if draw.random() < 0.5:
            pairs = [(receiver, sender) for sender, receiver in pairs]
        return self._cut(draw, pairs, ", ".join(f"n{sender} > n{receiver}" for sender, receiver in pairs))

    def partition(self, draw: random.Random) -> tuple[str, bool]:
        """Two halves that don't reach each other."""
        mixed = draw.sample(self.nodes, len(self.nodes))
        half = draw.randint(1, len(mixed) // 2)
        here, there = sorted(mixed[:half]), sorted(mixed[half:])
        pairs = [pair for one in here for other in there for pair in ((one, other), (other, one))]
        return self._cut(draw, pairs, f"{here} | {there}")

    def link_slowed(self, draw: random.Random) -> tuple[str, bool]:
        """The links of some nodes are slow for a while."""
        nodes = draw.sample(self.nodes, draw.choice([1, 1, 2, len(self.nodes)]))
        rate, seconds = draw.choice(RATES_BYTES_PER_S), draw.choice(DURATIONS_S)
        with contextlib.ExitStack() as stack:
            for node in nodes:
                stack.enter_context(self.slowed(node, rate))
            time.sleep(seconds)
        return f"{', '.join(f'n{node}' for node in sorted(nodes))} at {rate / 1e6} MB/s for {seconds} s", True

    def _cut(self, draw: random.Random, pairs: list[tuple[int, int]], what: str) -> tuple[str, bool]:
        seconds = draw.choice(DURATIONS_S)
        assert self.spaces is not None
        self.spaces.cut(pairs)
        try:
            time.sleep(seconds)
        finally:
            self.spaces.join(pairs)
        return f"{what} for {seconds} s", True

    @contextlib.contextmanager
    def slowed(self, node: int, bytes_per_s: float) -> Iterator[None]:
        """A node's link is slow for a while."""
        assert self.spaces is not None
        self.spaces.slow(node, bytes_per_s)
        try:
            yield
        finally:
            self.spaces.unslow(node)

    @contextlib.contextmanager
    def _unplugged(self, node: int) -> Iterator[None]:
        assert self.spaces is not None
        self.spaces.unplug(node)
        try:
            yield
        finally:
            self.spaces.plug(node)


def flip(memory: Path, draw: random.Random) -> None:
    """One bit of a piece of memory."""
    with memory.open("r+b", buffering=0) as file:
        place = file.seek(draw.randrange(memory.stat().st_size))
        found = file.read(1)
        file.seek(place)
        file.write(bytes([found[0] ^ 1 << draw.randrange(8)]))
