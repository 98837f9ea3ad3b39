"""The whole path on one machine: stall, time to commit, restore, rebuild, memory; each beside its reference.

Real daemons on loopback, one rank in this process on node n0. Every figure is a ratio to a reference measured next to
it in the same run, since machines like this are noisy; medians over the rounds, with the smallest and largest. Prints
the machine, then JSON lines. `goal` is what the design wants; `met` says whether this run reached it.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from holdfast.cli.cluster import Cluster, create
from holdfast.cli.link import Daemon
from holdfast.cli.recover import losses
from holdfast.client import Snapshotter

MIB = 1 << 20
RECEIVE_BYTES = 4 * MIB
WAIT_S = 120.0


def main() -> int:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description="end-to-end figures beside their references, as JSON lines")
    parser.add_argument("--mib", type=int, default=64, help="state of the rank, MiB")
    parser.add_argument("--rounds", type=int, default=9, help="snapshots per measurement")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--parity", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.mib, arguments.rounds = 8, 3
    say(machine())
    with tempfile.TemporaryDirectory(prefix="hfb") as folder:
        shape = {"node_count": arguments.nodes, "parity": arguments.parity, "group_size": arguments.nodes}
        cluster = create(Path(folder), memory_share=0.4, chunk_bytes=MIB, **shape)
        with cluster:
            cluster.start([f"n{index}" for index in range(arguments.nodes)])
            cluster.wait_up()
            measure(cluster, arguments)
    return 0


def measure(cluster: Cluster, arguments: argparse.Namespace) -> None:
    """All figures, in the order of a job's life."""
    common = {"mib": arguments.mib, "nodes": arguments.nodes, "parity": arguments.parity, "rounds": arguments.rounds}
    idle(cluster, common)
    state = make_state(arguments.mib)
    started_s = time.monotonic()
    with quiet():
        snapshotter = Snapshotter(state, job="bench", socket=first_socket(cluster), on_error="raise")
        snapshotter.restore()
    say({"what": "attach and ask what to restore", "seconds": time.monotonic() - started_s, **common})
    stall_and_commit(snapshotter, state, arguments, common)
    memory_held(cluster, arguments, common)
    snapshotter.close()
    restore(cluster, state, arguments, common)
    rebuild(cluster, common)


def stall_and_commit(
    snapshotter: Snapshotter, state: dict[str, torch.Tensor], arguments: argparse.Namespace, common: dict[str, object]
) -> None:
    """What step() and the wait before the update cost, with nothing to hide behind; and how long a commit takes."""
    state_bytes = sum(t.nbytes for t in state.values())
    copy_s, wire_s, stall_s, commit_s = [], [], [], []
    source, target = np.ones(state_bytes, np.uint8), np.ones(state_bytes, np.uint8)
    for step in range(arguments.rounds):
        copy_s.append(timed(lambda: np.copyto(target, source)))
        wire_s.append(raw_tcp(arguments.parity * state_bytes))
        before_s = time.monotonic()
        snapshotter.step(step)
        snapshotter.before_update()
        stall_s.append(time.monotonic() - before_s)
        snapshotter.wait(timeout_s=WAIT_S)
        commit_s.append(time.monotonic() - before_s)
    say(ratio("stall per snapshot, nothing to hide behind", stall_s, copy_s, goal=1.15, **common))
    first = {
        "first_ratio": stall_s[0] / statistics.median(copy_s),
        "worst_ratio": max(stall_s) / statistics.median(copy_s),
    }
    say({"what": "stall of the first and the worst snapshot", **first, "goal": 1.15, **common})
    say(ratio("step() to COMMITTED", commit_s, wire_s, goal=1.3, **common))


def restore(
    cluster: Cluster, state: dict[str, torch.Tensor], arguments: argparse.Namespace, common: dict[str, object]
) -> None:
    """From a fresh Snapshotter to all bytes back in place, from the own node's memory."""
    state_bytes = sum(t.nbytes for t in state.values())
    source, target = np.ones(state_bytes, np.uint8), np.ones(state_bytes, np.uint8)
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    copy_s, restore_s = [], []
    for _ in range(max(3, arguments.rounds // 2)):
        for tensor in state.values():
            tensor.zero_()
        copy_s.append(timed(lambda: np.copyto(target, source)))
        with quiet():
            snapshotter = Snapshotter(state, job="bench", socket=first_socket(cluster), on_error="raise")
            restore_s.append(timed(snapshotter.restore))
            snapshotter.close()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items()), "restored bytes differ"
    say(ratio("restore from the own node, attach and agreement included", restore_s, copy_s, goal=1.25, **common))


def rebuild(cluster: Cluster, common: dict[str, object]) -> None:
    """A node with an image is lost and replaced: how long until it is whole again."""
    cluster.kill(["n0"])
    cluster.start(["n0"])
    cluster.wait_up()
    with Daemon(cluster.nodes["n1"].socket) as daemon:
        wait_for(lambda: bool(losses(daemon.status())), "the replacement to know what it lost")
        lost_bytes = sum(entry["lost_bytes"] for entry in losses(daemon.status()).values())
        wire_s = raw_tcp(lost_bytes)
        started_s = time.monotonic()
        daemon.recover()
        wait_for(lambda: not losses(daemon.status()), "the rebuild")
        seconds = time.monotonic() - started_s
    say(ratio("rebuild of a lost node", [seconds], [wire_s], goal=1.5, lost_bytes=lost_bytes, **common))


def memory_held(cluster: Cluster, arguments: argparse.Namespace, common: dict[str, object]) -> None:
    """Arena memory of all nodes against what the code needs.

    Only n0 has an image here, so each of its chunks stands alone in its stripe and costs m parity chunks; with even
    images it would be m/k.
    """
    wait_for(lambda: all(node["arena_bytes"] for node in cluster.status()["nodes"]), "every node's heartbeat")
    status = cluster.status()
    held = sum(node["arena_bytes"] for node in status["nodes"])
    image = status["jobs"][0]["snapshot_bytes"]
    needed = image * 2 * (1 + arguments.parity)
    say(
        {
            "what": "memory held",
            "ratio": held / needed,
            "bytes": held,
            "goal": 1.02,
            "met": held / needed <= 1.02,
            **common,
        }
    )


def idle(cluster: Cluster, common: dict[str, object]) -> None:
    """CPU share and memory beside the arena of a daemon that has nothing to do."""
    pid = cluster.worker_pids("n0")[0]
    seconds, before = 3.0, cpu_s(pid)
    threading.Event().wait(seconds)
    share = (cpu_s(pid) - before) / seconds
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rss_bytes = int(fields["VmRSS"].split()[0]) * 1024
    met = share < 0.01 and rss_bytes < 80 * MIB
    say(
        {
            "what": "idle daemon",
            "cpu_share": share,
            "rss_mib": rss_bytes / MIB,
            "goal": "< 1 %, < 80 MiB",
            "met": met,
            **common,
        }
    )


# --- references and helpers of this program ---


def raw_tcp(size_bytes: int) -> float:
    """Seconds that so many bytes take over one TCP connection on loopback, received into place."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_send, args=(server.getsockname(), size_bytes))
        thread.start()
        connection, _ = server.accept()
        buffer = memoryview(bytearray(RECEIVE_BYTES))
        started_s, left = time.monotonic(), size_bytes
        with connection:
            while left > 0:
                left -= connection.recv_into(buffer)
        seconds = time.monotonic() - started_s
        thread.join()
    return seconds


def _send(address: tuple[str, int], size_bytes: int) -> None:
    block = memoryview(bytes(RECEIVE_BYTES))
    with socket.create_connection(address) as connection:
        left = size_bytes
        while left > 0:
            left -= connection.send(block[: min(left, RECEIVE_BYTES)])


def make_state(mib: int) -> dict[str, torch.Tensor]:
    """Plain tensors of 4 MiB and a few small ones, filled with noise, so that wrong bytes show."""
    torch.manual_seed(0)
    state = {f"t{index}": torch.randn(MIB) for index in range(max(1, mib // 4))}
    return state | {f"s{index}": torch.randn(100 + index) for index in range(20)}


def first_socket(cluster: Cluster) -> Path:
    """The socket of the node on which the rank lives."""
    return cluster.nodes["n0"].socket


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started_s = time.monotonic()
    work()
    return time.monotonic() - started_s


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Look until a condition holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {WAIT_S} s for {what}")
        threading.Event().wait(0.01)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ratio(
    what: str, ours_s: list[float], reference_s: list[float], *, goal: float, **more: object
) -> dict[str, object]:
    """One figure: medians, their ratio, the spread."""
    ours, reference = statistics.median(ours_s), statistics.median(reference_s)
    spread = {
        "min_s": min(ours_s),
        "max_s": max(ours_s),
        "reference_min_s": min(reference_s),
        "reference_max_s": max(reference_s),
    }
    found = ours / reference
    return {
        "what": what,
        "ratio": found,
        "seconds": ours,
        "reference_s": reference,
        **spread,
        "goal": goal,
        "met": found <= goal,
        **more,
    }


def machine() -> dict[str, object]:
    """What this ran on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "?",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "what": "machine",
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "command": " ".join(sys.argv),
    }


def say(fields: dict[str, object]) -> None:
    """One JSON line."""
    print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings between the JSON lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
