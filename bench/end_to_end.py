"""The whole path on one machine: stall, time to commit, restore, rebuild, memory; each beside its reference.

    python bench/end_to_end.py [--mib 64] [--rounds 9] [--nodes 4 --parity 2] [--quick]

Real daemons on loopback (with keys), one rank per node in a process of its own: a model and its optimizer. Every figure
is a ratio to a reference measured in turn with it in the same run, by all ranks at once as well, since such machines
are noisy; medians over the rounds, with the smallest and largest. Prints the machine, then JSON lines. `goal` is what
the design wants; `met` says whether this run reached it. Without --nodes: 2 nodes with parity 1, then 4 with parity 2.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from holdfast.cli.cluster import Cluster, create
from holdfast.cli.link import Daemon
from holdfast.client.link import Link
from lockstep import Ranks
from references import MIB, cpu_s, machine, private_bytes, ratio, raw_tcp, say, wait_for

SLOTS = 2  # the default of the config
REBUILDS = 3
SHAPES = ((2, 1), (4, 2))
_IMPORT = """
import sys, time, torch
started_s = time.monotonic()
import holdfast.client
foreign = [name for name in sys.modules if name.startswith(("holdfast.daemon", "holdfast.cli."))]
print(time.monotonic() - started_s, len(foreign))
"""


def main() -> int:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description="end-to-end figures beside their references, as JSON lines")
    parser.add_argument("--mib", type=int, default=64, help="state of one rank, MiB")
    parser.add_argument("--rounds", type=int, default=9, help="snapshots per measurement")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--parity", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.mib, arguments.rounds = 12, 3
    shapes = SHAPES if arguments.nodes is None else ((arguments.nodes, arguments.parity),)
    say(machine())
    for nodes, parity in shapes[:1] if arguments.quick else shapes:
        arguments.nodes, arguments.parity = nodes, parity
        with tempfile.TemporaryDirectory(prefix="hfb") as folder:
            cluster = create(
                Path(folder), node_count=nodes, parity=parity, group_size=nodes, memory_share=0.4, chunk_bytes=MIB
            )
            with cluster:
                cluster.start(cluster.nodes)
                cluster.wait_up()
                Figures(cluster, arguments).measure()
    return 0


class Figures:
    """The figures of one cluster, in the order of a job's life."""

    def __init__(self, cluster: Cluster, arguments: argparse.Namespace) -> None:
        self.cluster, self.arguments = cluster, arguments
        self.common = {name: getattr(arguments, name) for name in ("mib", "nodes", "parity", "rounds")}

    def say(self, fields: dict[str, object]) -> None:
        """Tell one figure, with what it was measured on."""
        say({**fields, **self.common})

    def measure(self) -> None:
        """All of them."""
        self.idle()
        self.client()
        sockets = [node.socket for node in self.cluster.nodes.values()]
        state_bytes, parity = self.arguments.mib * MIB, self.arguments.parity
        with Ranks(sockets, self.cluster.folder, state_bytes=state_bytes, parity=parity) as ranks:
            ranks.all_do("attach")
            self.protect(ranks)
            self.memory_held()
            ranks.all_do("close")
            self.restore(ranks)
        self.rebuild()

    def idle(self) -> None:
        """CPU share and memory beside the arena of a daemon that has nothing to do."""
        pids = [self.cluster.keeper_pid("n0"), *self.cluster.worker_pids("n0")]
        before, started_s = sum(map(cpu_s, pids)), time.monotonic()
        time.sleep(0.5 if self.arguments.quick else 4.0)
        share = (sum(map(cpu_s, pids)) - before) / (time.monotonic() - started_s)
        rss = sum(map(private_bytes, pids))
        met = share < 0.01 and rss < 80 * MIB
        goal = "< 1 % of a core, < 80 MiB"
        self.say({"what": "idle daemon", "cpu_share": share, "rss_mib": rss / MIB, "goal": goal, "met": met})

    def client(self) -> None:
        """What a trainer pays before its first step: import (beside torch's own) and attach."""
        found = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        import_s, foreign_count = found.stdout.split()
        wake_fd = os.eventfd(0)
        seconds = []
        for _ in range(5):
            started_s = time.monotonic()
            link = Link(self.cluster.nodes["n0"].socket, wake_fd=wake_fd)
            seconds.append(time.monotonic() - started_s)
            link.close()
        os.close(wake_fd)
        attach_s = statistics.median(seconds)
        self.say({
            "what": "client import and attach", "import_s": float(import_s), "foreign_modules": int(foreign_count),
            "attach_s": attach_s, "goal": "attach < 0.3 s, no module of other rooms",
            "met": attach_s < 0.3 and foreign_count == "0",
        })  # fmt: skip

    def protect(self, ranks: Ranks) -> None:
        """Stall and time to commit; the first snapshot makes the plan and the memory, so it is told apart as well."""
        count = self.arguments.rounds
        first = ranks.rounds(1, 0, hide=False)
        bare = ranks.rounds(count, 1, hide=False)
        hidden = ranks.rounds(count, 1 + count, hide=True)
        self.say(ratio("stall, nothing to hide behind", bare["stall"], bare["copy"], goal=1.15))
        self.say(ratio("stall, nothing to hide behind, worst", bare["stall"], bare["copy"], goal=1.15, worst=True))
        self.say(ratio("stall, first snapshot", first["stall"], bare["copy"], goal=1.15, worst=True))
        self.say(ratio("stall, steps of 3 copies", hidden["stall"], hidden["copy"], goal=0.1))
        self.say(ratio("step() to COMMITTED", bare["commit"], bare["wire"], goal=1.3))

    def memory_held(self) -> None:
        """Arena memory of all nodes against what the code needs."""
        wait_for(lambda: all(node["arena_bytes"] for node in self.cluster.status()["nodes"]), "all heartbeats")
        status = self.cluster.status()
        held = sum(node["arena_bytes"] for node in status["nodes"])
        parity = self.arguments.parity
        needed = status["jobs"][0]["snapshot_bytes"] * SLOTS * (1 + parity / (self.arguments.nodes - parity))
        fields = {"what": "memory held", "ratio": held / needed, "bytes": held, "goal": 1.02}
        self.say({**fields, "met": held / needed <= 1.02})

    def restore(self, ranks: Ranks) -> None:
        """From a fresh Snapshotter to all bytes back in place, from the own node's memory."""
        found = [pair for _ in range(max(3, self.arguments.rounds // 2)) for pair in ranks.all_do("restore")]
        what = "restore from the own node, attach and agreement included"
        self.say(ratio(what, [restore for _, restore in found], [copy for copy, _ in found], goal=1.25))

    def rebuild(self) -> None:
        """A node is lost and replaced: how long until it is whole again, by its own clock: it begins by itself."""
        rebuild_s, wire_s, rebuilt_bytes = [], [], 0
        for _ in range(1 if self.arguments.quick else REBUILDS):
            self.cluster.kill(["n0"])
            self.cluster.start(["n0"])
            self.cluster.wait_up()
            wait_for(lambda: bool(self._rebuilt()), "the rebuild")
            held = self._rebuilt()
            rebuild_s.append(max(float(job["rebuild_s"]) for job in held))
            rebuilt_bytes = sum(int(job["received_bytes"]) for job in held)
            wire_s.append(raw_tcp(rebuilt_bytes))
        self.say({**ratio("rebuild of a lost node", rebuild_s, wire_s, goal=1.5), "rebuilt_bytes": rebuilt_bytes})

    def _rebuilt(self) -> list[dict[str, Any]]:
        """What the replacement brought back, job by job; empty before it is whole."""
        with Daemon(self.cluster.nodes["n0"].socket) as daemon:
            rows = [row for row in daemon.status()["nodes"] if row["name"] == "n0"]
        held = [job for row in rows for job in row["jobs"].values()]
        return held if all(job["whole"] and job["rebuild"] == "done" for job in held) else []


if __name__ == "__main__":
    sys.exit(main())
