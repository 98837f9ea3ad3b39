"""``python -m sim PROFILE SEED [SEED ...]``, in tests/: replay runs, with the whole transcript of one that fails."""

import sys
import time

from sim.scenario import ScenarioError, run

if __name__ == "__main__":
    failed = 0
    profile_name, *words = sys.argv[1:]
    for word in words:
        first, _, last = word.partition("-")
        for seed in range(int(first), int(last or first) + 1):
            started_s = time.perf_counter()
            try:
                outcome = run(seed, profile_name)
            except ScenarioError as error:
                failed += 1
                print(error)
            else:
                print(f"seed {seed}: {outcome}, {time.perf_counter() - started_s:.2f} s")
    sys.exit(1 if failed else 0)
