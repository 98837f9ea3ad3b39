"""``python -m sim SEED [SEED ...]``: replay runs, with the whole transcript of one that fails."""

import sys
import time

from sim.scenario import ScenarioError, run

if __name__ == "__main__":
    failed = 0
    for word in sys.argv[1:]:
        first, _, last = word.partition("-")
        for seed in range(int(first), int(last or first) + 1):
            started_s = time.perf_counter()
            try:
                outcome = run(seed)
            except ScenarioError as error:
                failed += 1
                print(error)
            else:
                print(f"seed {seed}: {outcome}, {time.perf_counter() - started_s:.2f} s")
    sys.exit(1 if failed else 0)
