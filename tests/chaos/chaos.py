"""A cluster of real daemons under a seeded schedule of faults; after each, everything is restored and compared.

``make chaos MINUTES=30 CHAOS_SEED=1``, or ``python tests/chaos/chaos.py --turns 3``. Each node lives in a network
namespace behind a link of its own, where the kernel allows that, else all on loopback, without faults of links; what it
is stands in the first line. Two jobs train on bytes that follow from (job, step, rank): `wide` has a rank on every node
and a second one on the first, which are killed and started again at each turn; `solo` has one, whose process stays.

A turn is a fault, a new life of all ranks, and a commit. What was restored must be all of one step, bit for bit, and no
older than what any rank was ever told is committed. After each turn, and at the end when every job is forgotten, all
processes must hold what they held at first: descriptors, threads, memory; and no process may be left.

What is drawn follows from the seed and the number of the turn alone; when things happen is the machine's. Exit status:
0 clean, 1 a promise was broken.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # namespaces, shared with the measurements
sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))  # the cluster of real daemons
sys.path.insert(0, str(Path(__file__).parent))

import isolation
import namespaces
from faults import Fault, Faults
from holdfast.cli.keys import write_keys
from jobs import OWED_S, Job
from leaks import Held, growth, held_by, strangers
from local_cluster import LocalCluster, resident_bytes, until

SCHEDULE = ("seed", "minutes", "turns", "first-turn")
NODES, PARITY = 4, 2
BULK = ("digest", "sealed")  # how chunks travel with even and with odd seeds
SLOW_BESIDE = 0.25  # the share of turns in which a link is slow as well
NEVER_BESIDE = (
    "link",
    "partition",
    "memory",
    "allocation",
)  # with its own links, or with more to send than goes through
SETTLE_S = 30.0  # for what is let go to be gone
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])  # ranks are forked from a process that finds all this too
os.environ["OMP_NUM_THREADS"] = "1"
INSIDE = "--inside"  # given to the program that already runs in namespaces of its own


@dataclass
class Chaos:
    """One run."""

    cluster: LocalCluster
    faults: Faults
    jobs: list[Job]
    seed: int
    say: Callable[[str], None]
    happened: Counter[str] = field(default_factory=Counter)
    restored: Counter[str] = field(default_factory=Counter)
    bare: dict[str, Held] = field(default_factory=dict)  # while there is no job
    first: dict[str, Held] = field(default_factory=dict)  # when each job had committed once
    only: tuple[str, ...] = ()  # the faults to draw from; empty: all
    inside: bool = False  # whether all processes that there are, are ours
    doing: str = "the start"

    def start(self) -> None:
        """Boot, have each job commit once, and count."""
        self.cluster.start()
        self._begin_all()
        self._rest()
        self.bare = self._look()  # when all that a process makes once is made
        for job in self.jobs:
            job.forget_truth()
        self._begin_all()
        self.first = self._look()

    def _begin_all(self) -> None:
        for job in self.jobs:
            self._begin(job, covered=True)
            job.commits()

    def turn(self, number: int) -> None:
        """One fault, then everything is restored, compared and committed again."""
        started_s, draw = time.monotonic(), random.Random(f"{self.seed}/{number}")
        fault, beside = self._drawn(number), ""
        name = fault.__name__
        self.happened[name] += 1
        self.doing = f"turn {number}: {name}"
        with contextlib.ExitStack() as stack:
            if self.faults.slows and not name.startswith(NEVER_BESIDE) and draw.random() < SLOW_BESIDE:
                node, rate = draw.choice(self.faults.nodes), draw.choice([4e6, 16e6])
                stack.enter_context(self.faults.slowed(node, rate))
                beside = f", n{node}'s link at {rate / 1e6} MB/s beside"
                self.happened["link slow beside"] += 1
            what, covered = fault(draw)
            self.doing += f" {what}{beside}"
            self.cluster.wait_up()
            steps = [self._begin(job, covered=covered) for job in self.jobs]
        for job in self.jobs:
            job.commits()
        self._settle("all commit again", lambda: self._leaks(self.first))
        told = ", ".join(
            f"{job.name} at step {step}" if step is not None else f"{job.name} lost"
            for job, step in zip(self.jobs, steps, strict=True)
        )
        self.say(f"{self.doing}: restored {told}; {time.monotonic() - started_s:.1f} s")

    def _drawn(self, number: int) -> Fault:
        """The fault of a turn: all of the menu in some order, then all of it in another."""
        menu = [fault for fault in self.faults.menu() if not self.only or fault.__name__ in self.only]
        assert menu, f"expected some of {[fault.__name__ for fault in self.faults.menu()]}, found {self.only}"
        again, index = divmod(number, len(menu))
        return random.Random(f"{self.seed}/menu/{again}").sample(menu, len(menu))[index]

    def _begin(self, job: Job, *, covered: bool) -> int | None:
        """A new life of a job; the step that it restored. Where too much was lost, the job begins anew: None."""
        told, deadline_s = job.told_committed(), time.monotonic() + OWED_S
        while True:
            answers = job.begin()
            kinds = {answer[0] for answer in answers}
            if kinds == {"restored"}:
                break
            if kinds == {"lost"} and not covered:
                return self._anew(job)
            assert "ended" not in kinds, f"training of {job.name} ended: {answers}"
            assert time.monotonic() < deadline_s, f"no restore of {job.name} within {OWED_S} s: {answers}"
            self.restored["tried again"] += 1
            self.say(f"  {job.name} tries again: {answers[0]}")
        steps = {answer[1] for answer in answers}
        assert len(steps) == 1, f"{job.name}: ranks restored different steps: {answers}"
        assert all(answer[2] for answer in answers), f"{job.name}: other bytes than those of {steps}: {answers}"
        step: int | None = steps.pop()
        if covered:
            found = -1 if step is None else step
            assert found >= told, f"{job.name}: restored {step}, a rank was told that {told} is committed"
        self.restored["ranks restored and compared"] += len(answers)
        job.forget_truth()
        job.committed = -1 if step is None else step
        return step

    def _anew(self, job: Job) -> None:
        self.restored["jobs lost beyond parity"] += 1
        self.cluster.forget(job.name)
        job.forget_truth()
        answers = job.begin()
        assert all(answer == ("restored", None, True) for answer in answers), f"a forgotten job begins anew: {answers}"

    # --- leaks ---

    def _known(self) -> dict[str, int]:
        """Who should be there, by kind and name."""
        found = {}
        for node in self.faults.nodes:
            found[f"keeper of n{node}"] = self.cluster.keeper(node)
            found[f"worker of n{node}"] = self.cluster.worker(node)
        for job in self.jobs:
            found |= {f"rank {rank} of {job.name}": pid for rank, pid in job.pids().items() if job.lasting}
        return found

    def _look(self) -> dict[str, Held]:
        return {who: held_by(pid) for who, pid in self._known().items()}

    def _leaks(self, before: dict[str, Held]) -> list[str]:
        grown = [text for who, held in self._look().items() for text in growth(who, before.get(who, held), held)]
        return grown + self._strangers()

    def _strangers(self) -> list[str]:
        ranks = {pid for job in self.jobs for pid in job.pids().values()}
        return strangers(
            ranks | set(self._known().values()) | machinery(), folder=self.cluster.folder, everywhere=self.inside
        )

    def _settle(self, when: str, look: Callable[[], list[str]]) -> None:
        """Wait until nothing leaks; fails with who does."""
        left: list[str] = []

        def none_left() -> bool:
            nonlocal left
            try:
                left = look()
            except OSError as error:
                left = [f"a process went away: {error}"]
            return not left

        try:
            until(none_left, "nothing leaks", seconds=SETTLE_S)
        except AssertionError:
            raise AssertionError(f"leaks when {when}:\n  " + "\n  ".join(left)) from None

    def finish(self) -> None:
        """Forget all jobs; then nothing may be left of them, and at the very end no process."""
        self.doing = "the end"
        self._rest()
        self._settle("every job is forgotten", lambda: [*self._leaks(self.bare), *self._arena()])
        for job in self.jobs:
            job.end()
        for node in self.faults.nodes:
            self.cluster.kill(node)
        everywhere = self.inside
        self._settle("all is killed", lambda: strangers(machinery(), folder=self.cluster.folder, everywhere=everywhere))

    def _rest(self) -> None:
        for job in self.jobs:
            if not job.lasting:
                job.end()
        for job in self.jobs:
            if job.lasting and job.processes:
                job.rest()
            self.cluster.forget(job.name)

    def _arena(self) -> list[str]:
        held = {node: resident_bytes(self.cluster.worker(node), "RssShmem") for node in self.faults.nodes}
        return [f"worker of n{node} holds {size} bytes of arena" for node, size in held.items() if size > 1 << 20]


def machinery() -> set[int]:
    """Processes of ours that start ranks, and the first of the namespace."""
    found = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}  # type: ignore[attr-defined]
    return {1} | {pid for pid in found if pid}


def run(options: argparse.Namespace, say: Callable[[str], None]) -> str:
    """The whole run; its summary. Raises on the first broken promise or leak, with all that is known of it."""
    spaces = namespaces.Namespaces(NODES, tag="c") if options.inside else None
    slows = spaces is not None and namespaces.shapes()
    if spaces is not None:
        spaces.make()
        say(f"in namespaces; links can be cut{' and slowed' if slows else ', not slowed: no tbf in this kernel'}")
    started_s = time.monotonic()
    place = {"addresses": spaces.addresses, "inside": spaces.inside} if spaces is not None else {}
    with (
        tempfile.TemporaryDirectory(prefix="hfk-") as keys,
        LocalCluster(
            nodes=NODES, parity=PARITY, group_size=NODES, keys_dir=Path(keys), bulk=BULK[options.seed % 2], **place
        ) as cluster,
    ):
        guard = None if options.inside else isolation.guard(cluster.folder, Path(keys))
        write_keys(Path(keys), cluster.names)
        sockets = [cluster.socket(node) for node in range(NODES)]
        jobs = [Job("wide", (*range(NODES), 0), cluster.folder, sockets),
                Job("solo", (2,), cluster.folder, sockets, lasting=True)]  # fmt: skip
        faults = Faults(cluster, spaces, slows, PARITY, jobs)
        chaos = Chaos(cluster, faults, jobs, options.seed, say, only=tuple(options.only), inside=options.inside)
        try:
            chaos.start()
            turn, end_s = options.first_turn, started_s + options.minutes * 60
            while turn < options.first_turn + options.turns or time.monotonic() < end_s:
                chaos.turn(turn)
                turn += 1
            chaos.finish()
        except BaseException:
            for node in range(NODES):
                say(f"--- the end of the log of n{node}\n{cluster.log(node)[-3000:]}")
            say(f"broken in {chaos.doing}")
            raise
        finally:
            for job in jobs:
                job.end()
            if guard is not None:
                guard.kill()
                guard.communicate()
        counts = ", ".join(f"{name} {count}" for name, count in sorted((chaos.happened + chaos.restored).items()))
        stall_s = max(job.longest_stall_s() for job in jobs)
        seconds = time.monotonic() - started_s
        return (
            f"{turn - options.first_turn} turns in {seconds:.0f} s: {counts}; longest stall of a step {stall_s:.1f} s"
        )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="faults on real daemons, from one seed")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--turns", type=int, default=0, help="at least so many faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-turn", type=int, default=0, help="begin the schedule there")
    parser.add_argument("--only", nargs="*", default=[], metavar="FAULT", help="draw from these faults")
    parser.add_argument("--loopback", action="store_true", help="do not try namespaces")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        obstacle = "not asked for" if options.loopback else isolation.obstacle()
        if not obstacle:
            return isolation.run([sys.executable, __file__, *sys.argv[1:], INSIDE])
        print(f"on loopback, without faults of links: namespaces are {obstacle}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # outside of namespaces: clean up too
    commit = commit_here()
    print(f"seed {options.seed}, commit {commit}, bulk {BULK[options.seed % 2]}", flush=True)
    try:
        summary = run(options, lambda text: print(text, flush=True))
    except Exception:  # noqa: BLE001  # told with what replays it
        traceback.print_exc()
        place = (" --loopback" if options.loopback else "") + (
            f" --only {' '.join(options.only)}" if options.only else ""
        )
        again = " ".join(f"--{word} {vars(options)[word.replace('-', '_')]}" for word in SCHEDULE)
        print(f"replay: git checkout {commit} && .venv/bin/python tests/chaos/chaos.py {again}{place}", flush=True)
        return 1
    print(f"clean: seed {options.seed}, commit {commit}, {summary}", flush=True)
    return 0


def commit_here() -> str:
    """The commit, and whether files differ from it."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
