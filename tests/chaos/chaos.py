"""A cluster of real daemons under a seeded schedule of faults; after each, everything is restored and compared.

``python tests/chaos/chaos.py --minutes 30 --seed 1``; `run` is what tests call. A job of one rank lives on each node,
in this process, and stages bytes that follow from (job, step). Faults: SIGKILL and SIGSTOP of workers and keepers,
ranks that vanish, losses of nodes up to what parity covers and beyond it, bits that flip in held memory. At the end the
daemons must hold what they held at first: descriptors, threads, memory, processes.

Not covered here: cut and slowed links, which need network namespaces; the simulator has them.
"""

import argparse
import contextlib
import gc
import os
import random
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))  # the cluster of real daemons lies there

import torch
from holdfast.client import Snapshotter
from holdfast.client.errors import HoldfastError, NotRecoverableError
from local_cluster import LocalCluster, descriptors, resident_bytes, until

NODES, PARITY = 4, 2
SIZE = 100_000  # int64 elements per rank: 13 chunks of 64 KiB
OWED_S = 60.0  # for a commit or a restore after a fault; two busy cores
SLACK_BYTES = 24 << 20  # of a worker's own memory between two rests: allocator caches


def content(job: str, step: int) -> torch.Tensor:
    """The bytes of one job at one step."""
    return torch.arange(SIZE) * (step + 1) + zlib.crc32(job.encode())


class Rank:
    """One training process in this one: a state and what protects it."""

    def __init__(self, cluster: LocalCluster, node: int) -> None:
        self.cluster, self.node, self.job = cluster, node, f"job{node}"
        self.step, self.committed = 0, -1
        self.attach()

    def attach(self) -> None:
        """A new process takes the rank's place."""
        self.state = torch.zeros(SIZE, dtype=torch.int64)
        self.snapshotter = Snapshotter(
            {"state": self.state}, job=self.job, socket=self.cluster.socket(self.node), max_stall_s=5, on_error="warn"
        )

    def vanish(self) -> None:
        """End as a killed process does: without a word."""
        with contextlib.suppress(HoldfastError):
            self.snapshotter.__exit__(ValueError, ValueError("killed"), None)
        del self.snapshotter
        gc.collect()

    def train(self) -> None:
        """One step."""
        self.step += 1
        self.snapshotter.before_update()
        self.state.copy_(content(self.job, self.step))
        self.snapshotter.step(self.step)

    def commit(self) -> None:
        """Train until something is committed."""

        def look() -> bool:
            self.train()
            with contextlib.suppress(HoldfastError):
                self.snapshotter.wait(self.step, timeout_s=3)
                return True
            return False

        until(look, f"a commit of {self.job}", seconds=OWED_S)
        self.committed = self.step

    def restore(self, *, within_budget: bool = True) -> bool:
        """A restarted process restores and compares. Returns whether it got what was committed, or something newer."""
        self.vanish()
        self.attach()

        def look() -> tuple[int | None] | None:
            self.state.fill_(-1)
            try:
                return (self.snapshotter.restore(),)
            except NotRecoverableError:
                if not within_budget:
                    return (None,)
            except HoldfastError:
                pass
            self.vanish()
            self.attach()
            return None

        (found,) = until(look, f"a restore of {self.job}", seconds=OWED_S) or (None,)
        if found is not None:
            assert torch.equal(self.state, content(self.job, found)), f"{self.job}: other bytes than those of {found}"
            assert found >= self.committed or not within_budget, f"{self.job}: {found}, {self.committed} was committed"
            self.step = max(self.step, found)
        else:
            assert not within_budget, f"{self.job}: nothing restored, {self.committed} was committed"
        return found is not None and found >= self.committed


@dataclass
class Chaos:
    """One run."""

    cluster: LocalCluster
    seed: int
    ranks: list[Rank] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    say: Callable[[str], None] = lambda text: print(text, flush=True)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    # --- faults: each returns whether parity covers it ---

    def worker_killed(self, node: int) -> bool:
        """SIGKILL to a worker while ranks train."""
        self.cluster.kill_worker(node)
        return True

    def keeper_killed(self, node: int) -> bool:
        """SIGKILL to a keeper: its worker brings another."""
        before = self.cluster.keeper(node)
        os.kill(before, signal.SIGKILL)
        self.cluster.keepers[node].wait(20)
        until(
            lambda: [p for p in self.cluster.processes(node) if p != before and not self.cluster.is_worker(p)], "keeper"
        )
        return True

    def worker_frozen(self, node: int) -> bool:
        """SIGSTOP for a while."""
        pid = self.cluster.worker(node)
        os.kill(pid, signal.SIGSTOP)
        try:
            self._train(self.draw.randint(1, 5))
            time.sleep(self.draw.choice([0.1, 1.0, 4.0]))  # below and above what is taken for death
        finally:
            os.kill(pid, signal.SIGCONT)
        return True

    def rank_vanished(self, node: int) -> bool:
        """A rank ends in the middle of a snapshot."""
        self.ranks[node].train()
        return True

    def nodes_lost(self, node: int) -> bool:
        """As many nodes as parity covers, at once."""
        self._lose(self.draw.sample(range(NODES), self.draw.randint(1, PARITY)), node)
        return True

    def too_many_lost(self, node: int) -> bool:
        """One more than parity covers."""
        self._lose(self.draw.sample(range(NODES), PARITY + 1), node)
        return False

    def bits_flipped(self, node: int) -> bool:
        """A byte of each piece of data that a node holds, while nothing is in flight."""
        for rank in self.ranks:
            rank.commit()
        hit: set[int] = set()
        for entry in Path(f"/proc/{self.cluster.worker(node)}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                inode = entry.stat().st_ino
                if "/memfd:holdfast-data" in str(entry.readlink()) and inode not in hit:
                    hit.add(inode)
                    with entry.open("r+b", buffering=0) as memory:
                        place = memory.seek(self.draw.randrange(entry.stat().st_size))
                        found = memory.read(1)
                        memory.seek(place)
                        memory.write(bytes([found[0] ^ 1 << self.draw.randrange(8)]))
        assert hit, "a node with a rank holds data"
        return True

    def _lose(self, nodes: list[int], first: int) -> None:
        del first
        for node in nodes:
            self.cluster.kill(node)
        if self.draw.random() < 0.5:
            time.sleep(self.draw.choice([0.2, 3.0]))
        for node in nodes:
            self.cluster.spawn(node)

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            for rank in self.ranks:
                rank.train()

    # --- the run ---

    def start(self) -> None:
        """Boot, and have each job commit once."""
        self.cluster.start()
        self.ranks = [Rank(self.cluster, node) for node in range(NODES)]
        for rank in self.ranks:
            rank.snapshotter.restore()
            rank.commit()

    def turn(self) -> None:
        """One fault, then everything is restored, compared and committed again."""
        faults = [self.worker_killed, self.worker_killed, self.keeper_killed, self.worker_frozen, self.rank_vanished,
                  self.nodes_lost, self.nodes_lost, self.bits_flipped, self.too_many_lost]  # fmt: skip
        fault, node = self.draw.choice(faults), self.draw.randrange(NODES)
        self._train(self.draw.randint(0, 3))
        covered = fault(node)
        self.happened[fault.__name__] += 1
        self.cluster.wait_up()
        lost = 0
        for rank in self.ranks:
            if not rank.restore(within_budget=covered):
                lost += 1
                rank.vanish()
                self.cluster.forget(rank.job)
                rank.step = rank.committed = -1
                rank.attach()
                assert rank.snapshotter.restore() is None, "a forgotten job begins anew"
            rank.commit()
        restored = f"restored {len(self.ranks) - lost} of {len(self.ranks)} jobs"
        self.say(f"{fault.__name__} at n{node}: {restored}, all commit again")

    def rest(self) -> list[tuple[int, int, int, int]]:
        """Forget all jobs; what each worker then holds: descriptors but sockets, threads, arena and own bytes."""
        for rank in self.ranks:
            rank.vanish()
            self.cluster.forget(rank.job)
        found = []
        for node in range(NODES):
            pid = self.cluster.worker(node)
            until(lambda pid=pid: resident_bytes(pid, "RssShmem") < 1 << 20, "all arena memory is given back")  # type: ignore[misc]
            files = [name for name in descriptors(pid) if not name.startswith("socket:")]
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
            found.append((len(files), threads, resident_bytes(pid, "RssShmem"), resident_bytes(pid)))
        return found


def run(
    *, seed: int, seconds: float = 0.0, turns: int = 0, say: Callable[[str], None] = lambda text: None
) -> Counter[str]:
    """Run until `turns` faults have happened and `seconds` are over; raises on the first broken promise or leak."""
    with warnings.catch_warnings(), LocalCluster(nodes=NODES, parity=PARITY, group_size=NODES) as cluster:
        warnings.simplefilter("ignore", RuntimeWarning)  # that snapshots are skipped under faults is said, and fine
        chaos = Chaos(cluster, seed, say=say)
        chaos.start()
        first = chaos.rest()
        for rank in chaos.ranks:
            rank.step = rank.committed = -1
            rank.attach()
            rank.snapshotter.restore()
            rank.commit()
        end_s = time.monotonic() + seconds
        while chaos.happened.total() < turns or time.monotonic() < end_s:
            try:
                chaos.turn()
            except Exception as error:
                logs = "\n".join(f"--- n{node}\n{cluster.log(node)[-1500:]}" for node in range(NODES))
                raise AssertionError(f"seed {seed}, after {dict(chaos.happened)}: {error!r}\n{logs}") from error
        for node, (before, after) in enumerate(zip(first, chaos.rest(), strict=True)):
            assert after[0] <= before[0] + 2, f"n{node}: descriptors grew from {before[0]} to {after[0]}"
            assert after[1] <= before[1] + 1, f"n{node}: threads grew from {before[1]} to {after[1]}"
            assert after[3] <= before[3] + SLACK_BYTES, f"n{node}: own memory grew from {before[3]} to {after[3]} bytes"
            assert len(cluster.processes(node)) == 2, f"n{node}: {cluster.processes(node)}: one keeper and one worker"
        return chaos.happened


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="faults on real daemons, from one seed")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started_s = time.monotonic()
    happened = run(seed=options.seed, seconds=options.minutes * 60, say=lambda text: print(text, flush=True))
    print(
        f"clean: seed {options.seed}, {time.monotonic() - started_s:.0f} s, {happened.total()} faults: {dict(happened)}"
    )


if __name__ == "__main__":
    main()
