"""The promises of staging, with a real daemon: what is committed is what was there at the step, or nothing is.

And the trainer's process is left as it was: after an exception, in forked children, with an optimizer to come.
"""

import gc
import multiprocessing as mp
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from holdfast.client import SnapshotSkippedError, Snapshotter
from holdfast.client.capture import Capture
from holdfast.client.state_hash import hash_state
from local_cluster import LocalCluster, free_ports, until
from torch import nn

MakeCluster = Callable[..., LocalCluster]


class Run:
    """A model with buffers, and an optimizer that has made its first step unless told otherwise."""

    def __init__(self, seed: int, *, stepped: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 700), nn.BatchNorm1d(700), nn.Linear(700, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        if stepped:
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 64)).square().mean().backward()
        self.optimizer.step()

    def change_everything(self) -> None:
        """Every tensor, by every means that a program has, at once."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(3)
            for buffer in self.model.buffers():
                buffer.add_(1)
            for slots in self.optimizer.state.values():
                for tensor in slots.values():
                    tensor.add_(1)


def restored(cluster: LocalCluster, job: str) -> tuple[int | None, str]:
    run = Run(99)
    with Snapshotter(run.state, job=job, socket=cluster.socket(0), on_error="raise") as snapshotter:
        return snapshotter.restore(), hash_state(run.state)


@pytest.mark.parametrize("copied_first", [False, True])
def test_what_changes_right_after_step_is_never_committed_and_named(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, *, copied_first: bool
) -> None:
    run, job = Run(1), f"torn-{copied_first}"
    changed = threading.Event()
    start = Capture.start

    def start_beside_changes(capture: Capture, target: memoryview) -> None:
        if copied_first:  # from what was there; the look at the end can't know that
            capture.on_host = False
            start(capture, target)
            capture.on_host = True
            assert changed.wait(20)
        else:
            assert changed.wait(20)
            start(capture, target)

    snapshotter = Snapshotter(run.state, job=job, socket=cluster.socket(0), on_error="raise")
    snapshotter.step(0)
    snapshotter.wait(timeout_s=20)
    wanted = hash_state(run.state)
    monkeypatch.setattr(Capture, "start", start_beside_changes)
    snapshotter.step(1)
    run.change_everything()
    changed.set()
    with pytest.raises(SnapshotSkippedError, match=r"model/0\.\w+: changed while it was copied, 24 in all"):
        snapshotter.before_update()
    assert snapshotter.stats()["skipped"] == 1
    with pytest.raises(SnapshotSkippedError, match="can't commit"):  # the last one, and it was asked to raise
        snapshotter.close()
    assert restored(cluster, job) == (0, wanted)


def test_blocking_has_copied_before_it_returns(cluster: LocalCluster) -> None:
    run = Run(2)
    options = {"job": "blocking", "socket": cluster.socket(0), "on_error": "raise", "stage": "blocking"}
    with Snapshotter(run.state, **options) as snapshotter:  # type: ignore[arg-type]  # as written above
        for step in range(3):
            wanted = hash_state(run.state)
            snapshotter.step(step)
            run.change_everything()
            snapshotter.wait(timeout_s=20)
    assert restored(cluster, "blocking") == (2, wanted)


def test_the_parts_of_a_stall_add_up_and_the_daemon_hears_of_it(make_cluster: MakeCluster) -> None:
    (port,) = free_ports(1)
    cluster = make_cluster(nodes=1, parity=0, settings=("[http]", f'address = "127.0.0.1:{port}"'))
    cluster.start()
    run, steps = Run(8), 4
    snapshotter = Snapshotter(run.state, job="stalls", socket=cluster.socket(0), on_error="raise")
    for step in range(steps):
        snapshotter.step(step)
        run.step()
        stats = snapshotter.stats()
        for which in ("last", "total"):
            assert sum(stats["stall_parts_s"][which].values()) == pytest.approx(stats["stall_s"][which], abs=1e-9)
    total = stats["stall_parts_s"]["total"]
    assert set(total) == {"slot", "copy", "plan", "capture", "enqueue", "other"}
    assert min(total[part] for part in ("plan", "capture", "enqueue")) > 0, total
    assert stats["stall_parts_s"]["last"]["plan"] == 0
    snapshotter.close()

    def counted() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line.startswith("holdfast_stall_seconds_"))
        return {name: float(value) for name, _, value in samples}

    until(lambda: counted().get('holdfast_stall_seconds_count{job="stalls"}') == steps + 1, "every stall was told")
    assert counted()['holdfast_stall_seconds_sum{job="stalls"}'] == pytest.approx(stats["stall_s"]["total"], rel=0.01)


def test_updates_wait_for_the_copy_and_what_forward_changes_was_copied_at_once(cluster: LocalCluster) -> None:
    run = Run(3)
    with Snapshotter(run.state, job="lazy", socket=cluster.socket(0), on_error="raise") as snapshotter:
        for step in range(5):
            wanted = hash_state(run.state)
            snapshotter.step(step)
            run.step()  # forward changes the buffers, the optimizer everything else
        snapshotter.wait(timeout_s=20)
    assert restored(cluster, "lazy") == (4, wanted)


def test_memory_is_made_at_the_restore_where_the_state_is_complete(cluster: LocalCluster) -> None:
    for stepped in (True, False):
        run = Run(4, stepped=stepped)
        with Snapshotter(run.state, job=f"early-{stepped}", socket=cluster.socket(0), on_error="raise") as snapshotter:
            assert snapshotter.restore() is None
            assert (snapshotter._proposal is not None) is stepped
            run.step()
            snapshotter.step(7)  # whatever its number, the first is staged
            snapshotter.wait(timeout_s=20)
            assert snapshotter.stats()["committed_step"] == 7


def test_the_first_step_of_all_is_staged_whatever_the_cadence(cluster: LocalCluster) -> None:
    run = Run(5)
    with Snapshotter(run.state, job="cadence", socket=cluster.socket(0), every=10, on_error="raise") as snapshotter:
        snapshotter.restore()
        for step in (3, 4, 13):
            snapshotter.step(step)
            snapshotter.wait(timeout_s=20)
            assert snapshotter.stats()["committed_step"] == (13 if step == 13 else 3)


def test_restored_tensors_are_the_trainers_own(cluster: LocalCluster) -> None:
    run = Run(6)
    with Snapshotter(run.state, job="own", socket=cluster.socket(0), on_error="raise") as snapshotter:
        snapshotter.step(0)
    wanted = hash_state(run.state)
    fresh = Run(7, stepped=False)  # its optimizer has no state yet: the tensors are made
    with Snapshotter(fresh.state, job="own", socket=cluster.socket(0), on_error="raise") as snapshotter:
        assert snapshotter.restore() == 0
        assert hash_state(fresh.state) == wanted
        fresh.change_everything()
    assert restored(cluster, "own") == (0, wanted)


def mapped() -> bool:
    return "memfd:holdfast" in Path("/proc/self/maps").read_text()


def stagers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("holdfast")]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_loop_leaves_no_thread_and_no_memory(
    cluster: LocalCluster, error: type[BaseException]
) -> None:
    run, before = Run(8), set(stagers())  # of earlier tests in this process

    def loop() -> None:
        with Snapshotter(run.state, job="thrown", socket=cluster.socket(0), on_error="raise") as snapshotter:
            snapshotter.step(0)
            raise error("in mid loop")

    with pytest.raises(error):
        loop()
    gc.collect()
    assert set(stagers()) <= before
    assert not mapped()
    run.step()  # no hook of ours is left on the optimizer


def test_a_snapshotter_that_is_dropped_without_close_leaves_nothing(cluster: LocalCluster) -> None:
    run, before = Run(10), set(stagers())
    snapshotter = Snapshotter(run.state, job="dropped", socket=cluster.socket(0), on_error="raise")
    snapshotter.step(0)
    snapshotter.wait(timeout_s=20)
    mine = set(stagers()) - before
    assert mine
    del snapshotter
    gc.collect()
    for thread in mine:
        thread.join(20)
        assert not thread.is_alive()
    run.step()  # no hook of ours is left on the optimizer
    gc.collect()
    assert not mapped()


def _child(queue: "mp.Queue[bool]") -> None:
    queue.put(True)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_come_and_go_while_snapshots_are_staged(cluster: LocalCluster) -> None:
    run = Run(9)
    fork = mp.get_context("fork")
    queue: mp.Queue[bool] = fork.Queue()
    with Snapshotter(run.state, job="forked", socket=cluster.socket(0), on_error="raise") as snapshotter:
        for step in range(3):
            wanted = hash_state(run.state)
            snapshotter.step(step)
            child = fork.Process(target=_child, args=(queue,))
            child.start()
            assert queue.get(timeout=20)
            child.join(20)
            assert child.exitcode == 0
            run.step()
        snapshotter.wait(timeout_s=20)
        assert snapshotter.stats()["attached"]
    assert restored(cluster, "forked") == (2, wanted)
