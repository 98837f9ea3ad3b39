"""Memory, descriptors and threads return to where they were: in daemons after `forget`, in a trainer after close."""

import gc
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest
import torch
from holdfast.cli.link import Daemon
from holdfast.client import Snapshotter
from holdfast.client.errors import RefusedError
from holdfast.client.session import RankPlan
from holdfast.client.stager import Stager
from holdfast.protocol.layout import Layout, ShardPlace
from local_cluster import LocalCluster, descriptors, memfds, resident_bytes, until

MakeCluster = Callable[..., LocalCluster]
STATE_BYTES = 16 << 20
SLACK_BYTES = 8 << 20  # allocator caches; far less than one snapshot


def protect(cluster: LocalCluster, job: str, *, steps: int = 3, size_bytes: int = STATE_BYTES) -> None:
    state = torch.arange(size_bytes // 8)
    with Snapshotter({"state": state}, job=job, socket=cluster.socket(0), on_error="raise") as snapshotter:
        for step in range(steps):
            snapshotter.step(step)
            snapshotter.wait(timeout_s=20)


def sockets_aside(pid: int) -> list[str]:
    """Open descriptors but sockets, whose count follows connections that come and go by themselves."""
    return [name.partition(":")[0] if name.startswith("anon_inode") else name for name in descriptors(pid)
            if not name.startswith("socket:")]  # fmt: skip


def threads() -> set[str]:
    return {entry.name for entry in Path("/proc/self/task").iterdir()}


def added(before: list[str]) -> Counter[str]:
    """Descriptors of this process beyond those of before, whose own may have gone meanwhile."""
    return Counter(descriptors(os.getpid())) - Counter(before)


def maps_of_arena() -> int:
    return sum("memfd:holdfast" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_forgotten_job_leaves_nothing_in_the_daemons(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, parity=1)
    cluster.start()
    protect(cluster, "first", size_bytes=1 << 20)  # connections between all nodes exist from now on
    cluster.forget("first")
    pids = [find(node) for node in range(2) for find in (cluster.worker, cluster.keeper)]
    files = [sockets_aside(pid) for pid in pids]
    shared_bytes = [resident_bytes(pid, "RssShmem") for pid in pids]
    own_bytes = [resident_bytes(pid) for pid in pids]
    for round_ in range(3):
        protect(cluster, f"job{round_}")
        assert len(memfds(cluster.keeper(0))) > len([name for name in files[1] if "memfd" in name])
        assert resident_bytes(cluster.worker(0), "RssShmem") > shared_bytes[0] + STATE_BYTES
        cluster.forget(f"job{round_}")
    for index, pid in enumerate(pids):
        until(lambda i=index, p=pid: sockets_aside(p) == files[i], f"descriptors of {pid}")  # type: ignore[misc]
        assert resident_bytes(pid, "RssShmem") <= shared_bytes[index] + (1 << 20)
        assert resident_bytes(pid) <= own_bytes[index] + SLACK_BYTES
    assert all(row["arena_bytes"] == 0 for row in cluster.status()["nodes"])


def test_a_closed_snapshotter_leaves_nothing_in_the_trainer(cluster: LocalCluster) -> None:
    protect(cluster, "warm", steps=1, size_bytes=1 << 20)  # what torch and ZeroMQ make once
    gc.collect()
    files, running = descriptors(os.getpid()), threads()
    shared_bytes = resident_bytes(os.getpid(), "RssShmem")
    for round_ in range(20):
        protect(cluster, "warm", steps=1, size_bytes=1 << 20)
        assert maps_of_arena() == 0, round_
    gc.collect()
    until(lambda: threads() <= running, "threads end")
    assert not added(files)
    assert resident_bytes(os.getpid(), "RssShmem") <= shared_bytes + (1 << 20)
    cluster.forget("warm")


def test_a_closed_snapshotter_stops_asking_a_daemon_that_knows_nothing_of_its_attempt(cluster: LocalCluster) -> None:
    """As after the loss of all nodes: the daemon asks for patience, and would get minutes of it."""
    stager = Stager(Path(cluster.socket(0)), max_stall_s=1.0)
    stager.submit(stager.attach).result(20)
    plan = RankPlan("gpt", 5, 0, Layout((ShardPlace(0, 64),), 0, 1))
    said = stager.submit(lambda: stager.say_plan(plan, deadline_s=monotonic() + 100))
    until(lambda: stager.link.session.denied or said.done(), "the daemon does not know the attempt", seconds=20)
    stager.stop(timeout_s=10)
    assert not stager._thread.is_alive()
    with pytest.raises(RefusedError, match="attempt 5 is not known here yet"):
        said.result(0)


def test_commands_leave_nothing_in_the_daemon(cluster: LocalCluster) -> None:
    cluster.status()
    worker = cluster.worker(0)
    before = len(descriptors(worker))
    for _ in range(50):
        with Daemon(cluster.socket(0)) as daemon:
            daemon.status()
    until(lambda: len(descriptors(worker)) <= before, "the connections of commands are closed")


@pytest.mark.parametrize("good", [True, False], ids=["closed", "error"])
def test_a_snapshotter_that_meets_nobody_leaves_nothing(tmp_path: Path, *, good: bool) -> None:
    state = {"state": torch.zeros(10)}

    def attempt() -> None:
        snapshotter = Snapshotter(state, job="nobody", socket=tmp_path / "none.sock", max_stall_s=0.05)
        with pytest.warns(RuntimeWarning, match="no daemon answers"):
            snapshotter.step(0)
        if good:
            snapshotter.close()
        else:
            snapshotter.__exit__(ValueError, ValueError(), None)

    attempt()
    files, running = descriptors(os.getpid()), threads()
    for _ in range(5):
        attempt()
    gc.collect()
    until(lambda: threads() <= running, "threads end")
    assert not added(files)
