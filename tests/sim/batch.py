"""Many clusters on all cores: ``python -m sim.batch [--seeds N] [--first SEED] [--seconds S] [--profile NAME] [--out FILE]``.

Each failure is one line with what replays it exactly: profile, seed, commit. Needs nothing but the product and the
standard library, so that it runs where no test framework is.
"""

import argparse
import gc
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sim.scenario import PROFILES, ScenarioError, run

# Small clusters are cheap and fail for the same reasons as wide ones, so most runs are of them.
MIX = (
    *["few"] * 40, "restarts", "restarts", "losses", "losses", "crashes", "reads", "beyond", "strays", "everything", "wide"
)  # fmt: skip
PROGRESS_CLUSTERS = 1000  # between two lines that say how far it is
BATCH_PER_PROCESS = 60  # clusters queued at once
RUNS_PER_PROCESS = 200  # then a fresh one, so that nothing adds up


def commit() -> str:
    """The commit that is run, or what the caller says it is."""
    if given := os.environ.get("SIM_COMMIT"):
        return given
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def play(job: tuple[str, int, float]) -> tuple[str, int, float, int, str] | None:
    """One cluster: (profile, seed, CPU seconds, events, what broke); None when time is over."""
    profile, seed, deadline_s = job
    if time.monotonic() >= deadline_s:
        return None
    started_s = time.process_time()
    gc.collect()
    gc.disable()  # within one cluster it finds nothing, and takes an eighth of the time
    try:
        events, problem = run(seed, profile).events, ""
    except ScenarioError as error:
        events, problem = 0, str(error).splitlines()[0]
    return profile, seed, time.process_time() - started_s, events, problem


def jobs(first: int, count: int | None, profile: str | None, deadline_s: float) -> Iterator[tuple[str, int, float]]:
    """What to run, until there is enough of it or time is over."""
    numbers = itertools.count(first) if count is None else iter(range(first, first + count))
    for seed in numbers:
        if time.monotonic() >= deadline_s:
            return
        yield profile or MIX[seed % len(MIX)], seed, deadline_s


def main() -> int:
    """Run, print, count."""
    parser = argparse.ArgumentParser(description="play simulated clusters on all cores")
    parser.add_argument("--seeds", type=int, default=None, help="how many clusters; without it, as many as fit")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no cluster after so long")
    parser.add_argument("--profile", choices=sorted(PROFILES), default=None, help="one profile; without it, a mix")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=None, help="also write failures and the summary here")
    options = parser.parse_args()
    if options.seeds is None and options.seconds >= 1e9:
        parser.error("say how many clusters (--seeds) or for how long (--seconds)")
    mark, started_s = commit(), time.monotonic()
    out = options.out.open("w", encoding="utf-8", buffering=1) if options.out else None

    def say(text: str) -> None:
        print(text, flush=True)
        if out is not None:
            out.write(text + "\n")

    played: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    cpu_s = events = 0.0
    slowest = (0.0, "", 0)
    work = jobs(options.first, options.seeds, options.profile, started_s + options.seconds)
    with multiprocessing.Pool(options.processes, maxtasksperchild=RUNS_PER_PROCESS) as pool:
        while batch := list(itertools.islice(work, BATCH_PER_PROCESS * options.processes)):
            for profile, seed, taken_s, event_count, problem in filter(None, pool.imap_unordered(play, batch)):
                played[profile] += 1
                cpu_s, events = cpu_s + taken_s, events + event_count
                slowest = max(slowest, (taken_s, profile, seed))
                if sum(played.values()) % PROGRESS_CLUSTERS == 0:
                    say(f"{sum(played.values())} clusters, {cpu_s:.0f} CPU-s")
                if problem:
                    failed[profile] += 1
                    say(f"FAILED {profile} {seed} commit {mark}: {re.sub(r'^seed .*? s, ', '', problem)[:400]}")
    total, wall_s = sum(played.values()), time.monotonic() - started_s
    say(
        f"{total} clusters ({dict(sorted(played.items()))}) of commit {mark}, seeds {options.first}.."
        f"{options.first + total - 1}: {sum(failed.values())} failed ({dict(failed)}); {events:.0f} events, "
        f"{cpu_s:.0f} CPU-s ({cpu_s / max(total, 1):.2f} per cluster, slowest {slowest[0]:.1f}: {slowest[1]} {slowest[2]}), "
        f"{wall_s:.0f} s on {options.processes} processes"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
