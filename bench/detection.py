"""How long after its death a node is known to be down: by each survivor itself, and by what `status` says anywhere.

    python bench/detection.py [--nodes 4 --parity 1] [--kills 20] [--busy 0]

Real daemons with keys on loopback. Each kill takes keeper and worker of the next node, with SIGKILL; a replacement
follows. Seconds count from before the first signal. `alone` is the line in the log of each survivor, `told` the first
status through each survivor's socket that says so. A survivor that takes it back afterwards is counted. `--busy`
processes that only compute run beside it. Prints the machine, then JSON lines.
"""

import argparse
import datetime as dt
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recovery import Lab, Network
from references import machine, say, wait_for

GOAL_S = 3.0
DEADLINE_S = 20.0
AFTER_S = 3.0  # a survivor that takes it back does so by then
LOOK_S = 0.02
_STAMP = "%Y-%m-%d %H:%M:%S,%f"


def main() -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description="how long until a dead node is known as down, as JSON lines")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--parity", type=int, default=1)
    parser.add_argument("--mib", type=int, default=4, help="image of one node, MiB")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--busy", type=int, default=0, help="processes that only compute, beside the cluster")
    arguments = parser.parse_args()
    arguments.chunk_kib, arguments.lost = 64, 1
    say(machine())
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    with tempfile.TemporaryDirectory(prefix="hfd") as folder:
        lab = Lab(Path(folder), Network(arguments), arguments)
        try:
            lab.start(range(arguments.nodes))
            lab.stage()
            kills = [_lose(lab, number % arguments.nodes) for number in range(arguments.kills)]
        finally:
            lab.stop()
            for process in busy:
                process.kill()
                process.wait()
    common = {"nodes": arguments.nodes, "kills": arguments.kills, "busy": arguments.busy, "load": os.getloadavg()[0]}
    for what, index in (("known by each survivor alone", 0), ("told by status anywhere", 1)):
        seconds = sorted(second for kill in kills for second in kill[index])
        fields = {"median_s": statistics.median(seconds), "max_s": seconds[-1], "goal_s": GOAL_S}
        say({"what": what, **fields, "met": seconds[-1] <= GOAL_S, **common})
    say({"what": "taken back", "count": sum(kill[2] for kill in kills), "goal": 0, **common})
    return 0


def _lose(lab: Lab, node: int) -> tuple[list[float], list[float], int]:
    """Kill a node; seconds until each survivor knew, until each told, and how often one took it back."""
    survivors = [other for other in lab.daemons if other != node]
    logs = {other: lab.folder / f"{lab.names[other]}.log" for other in survivors}
    read_bytes = {other: path.stat().st_size for other, path in logs.items()}
    killed_s = _now_s()
    lab.kill(node)
    with ThreadPoolExecutor(len(survivors)) as threads:
        told = list(threads.map(lambda other: _told_s(lab, other, node) - killed_s, survivors))
    time.sleep(AFTER_S)
    alone, taken_back = [], 0
    for other, path in logs.items():
        lines = path.read_bytes()[read_bytes[other] :].decode(errors="replace").splitlines()
        down = [line for line in lines if f"node {lab.names[node]} is down" in line]
        stamp = dt.datetime.strptime(" ".join(down[0].split()[:2]), _STAMP)  # noqa: DTZ007  # as the log: local
        alone.append(stamp.timestamp() - killed_s)
        taken_back += sum(f"node {lab.names[node]} is up" in line for line in lines)
    lab.start([node])
    wait_for(lambda: lab.entry(node)["whole"], "the rebuild", look_s=LOOK_S)
    return alone, told, taken_back


def _told_s(lab: Lab, through: int, node: int) -> float:
    """When the status through a survivor's socket first said that the node is down."""
    deadline_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline_s:
        status = lab.status(through)
        if status is not None and status["nodes"][node]["state"] == "down":
            return _now_s()
        time.sleep(LOOK_S)
    raise TimeoutError(f"{lab.names[through]} did not say within {DEADLINE_S} s that {lab.names[node]} is down")


def _now_s() -> float:
    """The wall clock, which the logs tell."""
    return dt.datetime.now().timestamp()  # noqa: DTZ005  # of this machine, as the log


if __name__ == "__main__":
    sys.exit(main())
