"""Trainers over the network on one machine: staging and restoring beside raw TCP of the same bytes, in the same minute.

    python bench/remote.py [--mib 128] [--rounds 7] [--quick]

One real daemon on loopback, one rank in this process: with keys (CURVE on every byte, as between hosts) and without.
`send` is from the copy's end to the daemon having all bytes; `step() to sealed` has the copy, too; `open` is a
restore's fetch of the shard. Each is a ratio to one raw TCP connection, measured in turn with it. Prints the machine,
then JSON lines.
"""

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from holdfast.cli.cluster import Cluster, create
from holdfast.cli.keys import write_trainer_keys
from holdfast.client import Snapshotter
from holdfast.client.remote import RemoteLink
from references import MIB, machine, raw_tcp, say, wait_for

LOOK_S = 0.0005


def main() -> int:
    """Measure with keys and without."""
    parser = argparse.ArgumentParser(description="trainers over the network beside raw TCP, as JSON lines")
    parser.add_argument("--mib", type=int, default=128, help="state of the rank, MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small and short: to see that it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.mib, arguments.rounds = 8, 2
    say(machine())
    for keys in (True, False):
        with tempfile.TemporaryDirectory(prefix="hfb") as folder, _cluster(Path(folder), keys=keys) as cluster:
            cluster.start(cluster.nodes)
            cluster.wait_up()
            _measure(arguments, keys=keys)
    return 0


def _cluster(folder: Path, *, keys: bool) -> Cluster:
    """One node that lets trainers in over the network; its address is in this process's environment, as a rank's is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = create(folder, node_count=1, parity=0, group_size=1, memory_share=0.4, chunk_bytes=MIB)
    os.environ.pop("HOLDFAST_KEYS_DIR", None)
    lines = cluster.config_file.read_text().splitlines()
    if keys:
        write_trainer_keys(folder / "keys", ["trainer"])
        os.environ["HOLDFAST_KEYS_DIR"] = str(folder / "keys")
    else:
        lines = [line for line in lines if "keys_dir" not in line]
    lines += ["[trainers]", f'address = "127.0.0.1:{port}"']
    cluster.config_file.write_text("\n".join(lines) + "\n")
    os.environ["HOLDFAST_SOCKET"] = f"tcp://n0@127.0.0.1:{port}"
    return cluster


def _measure(arguments: argparse.Namespace, *, keys: bool) -> None:
    state = torch.ones(arguments.mib * MIB // 4)
    sent_s: list[float] = []
    RemoteLink.ship = _timed(RemoteLink.__dict__["ship"], sent_s)  # type: ignore[method-assign]
    wire_s, sealed_s, open_s = [], [], []
    address = os.environ["HOLDFAST_SOCKET"]
    with Snapshotter({"state": state}, job="bench", socket=address, on_error="raise", max_stall_s=60.0) as snapshotter:
        snapshotter.restore()
        for step in range(arguments.rounds + 1):
            wire_s.append(raw_tcp(arguments.mib * MIB))
            started_s = time.monotonic()
            snapshotter.step(step)
            wait_for(lambda step=step: snapshotter.stats()["sealed_step"] == step, "the seal", look_s=LOOK_S)
            sealed_s.append(time.monotonic() - started_s)
            snapshotter.wait()
        assert snapshotter.stats()["transport"] == "zeromq"
    for last in range(arguments.rounds, 2 * arguments.rounds):
        wire_s.append(raw_tcp(arguments.mib * MIB))
        with Snapshotter({"state": state}, job="bench", socket=address, on_error="raise") as snapshotter:
            assert snapshotter.restore() == last
            open_s.append(snapshotter.stats()["restore_s"]["open"])
            snapshotter.step(last + 1)  # else the daemon tells that lives begin from one step again and again
    reference_s = statistics.median(wire_s[1:])
    common = {
        "keys": keys, "mib": arguments.mib, "rounds": arguments.rounds, "raw_tcp_s": reference_s,
        "raw_tcp_gb_per_s": arguments.mib * MIB / reference_s / 1e9,
    }  # fmt: skip
    for what, found in (("send", sent_s[1:]), ("step() to sealed", sealed_s[1:]), ("open", open_s)):
        middle_s = statistics.median(found)
        say({
            "what": what, "ratio": middle_s / reference_s, "seconds": middle_s, "min_s": min(found),
            "max_s": max(found), "gb_per_s": arguments.mib * MIB / middle_s / 1e9, **common,
        })  # fmt: skip


def _timed(method: Callable[..., None], into: list[float]) -> Callable[..., None]:
    method = getattr(method, "untimed", method)

    def timed(*arguments: object, **options: object) -> None:
        started_s = time.monotonic()
        method(*arguments, **options)
        into.append(time.monotonic() - started_s)

    timed.untimed = method  # type: ignore[attr-defined]
    return timed


if __name__ == "__main__":
    raise SystemExit(main())
