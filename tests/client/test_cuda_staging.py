"""Staging from a GPU and restoring to it, through a real daemon: bit-exact whatever training does meanwhile.

Skipped where there is no GPU; `test_lanes.py` and `test_capture.py` hold the same planner on the CPU.
"""

import contextlib
import copy
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from holdfast.cli.cluster import create
from holdfast.client import SnapshotSkippedError, Snapshotter
from holdfast.client.cuda_lane import CudaLane
from holdfast.client.moves import Moves
from holdfast.client.state_errors import StateError
from holdfast.client.state_hash import hash_state
from torch import nn

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.integration,
]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def socket() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="hfg") as folder:
        cluster = create(Path(folder), node_count=2, parity=1, group_size=2, memory_share=0.5, chunk_bytes=1 << 20)
        with cluster:
            cluster.start(cluster.nodes)
            cluster.wait_up()
            yield str(cluster.nodes["n0"].socket)


class Run:
    """Large and small parameters, buffers that forward changes, a fused optimizer: everything on the GPU."""

    def __init__(self, seed: int = 0, *, fused: bool = True) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.Dropout(0.1)]
        layers += [nn.Linear(1024, 32)] + [nn.Linear(32, 32) for _ in range(40)]
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=fused)
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def forward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(64, 1024, device="cuda")).square().mean().backward()

    def step(self) -> None:
        self.forward()
        self.optimizer.step()


def restored(socket: str, job: str, *, fused: bool = True) -> tuple[int | None, "Run"]:
    run = Run(seed=9, fused=fused)
    with Snapshotter(run.state, job=job, socket=socket, on_error="raise") as snapshotter:
        return snapshotter.restore(), run


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "steps on the CPU"])
@pytest.mark.parametrize("stage", ["lazy", "blocking"])
def test_what_comes_back_is_what_was_there_and_training_goes_on_alike(socket: str, stage: str, fused: bool) -> None:
    run, job = Run(fused=fused), f"alike-{stage}-{fused}"
    snapshotter = Snapshotter(run.state, job=job, socket=socket, on_error="raise", stage=stage)  # type: ignore[arg-type]
    hashes = {}
    for step in range(4):
        run.step()
        hashes[step] = hash_state(run.state)
        snapshotter.step(step)
    snapshotter.close()
    assert snapshotter.stats()["committed_step"] == 3
    run.step()
    found, fresh = restored(socket, job, fused=fused)
    assert found == 3
    assert hash_state(fresh.state) == hashes[3]
    fresh.step()  # the generators came back, too: dropout draws the same
    assert hash_state(fresh.state) == hash_state(run.state)


def test_updates_wait_on_the_device_for_the_copy_and_the_host_does_not(
    socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side stream is held up for half a second: the update is enqueued long before, and comes after the copy."""
    run = Run()
    snapshotter = Snapshotter(run.state, job="order", socket=socket, on_error="raise")
    run.step()
    snapshotter.step(0)
    snapshotter.wait(timeout_s=WAIT_S)
    depart = CudaLane.depart

    def slow_depart(lane: CudaLane) -> object:
        passage = depart(lane)
        with torch.cuda.stream(lane.side):
            torch.cuda._sleep(int(1e9))
        return passage

    monkeypatch.setattr(CudaLane, "depart", slow_depart)
    run.step()
    wanted = hash_state(run.state)
    torch.cuda.synchronize()
    started_s = time.monotonic()
    snapshotter.step(1)
    run.step()
    enqueued_s = time.monotonic() - started_s
    torch.cuda.synchronize()
    done_s = time.monotonic() - started_s
    assert hash_state(run.state) != wanted
    snapshotter.close()
    assert enqueued_s < done_s / 2, (enqueued_s, done_s)
    found, fresh = restored(socket, "order")
    assert found == 1
    assert hash_state(fresh.state) == wanted


def test_buffers_are_captured_before_the_next_forward_changes_them(socket: str) -> None:
    run = Run()
    snapshotter = Snapshotter(run.state, job="buffers", socket=socket, on_error="raise")
    run.step()
    for step in range(3):
        mean = run.model[1].running_mean
        assert isinstance(mean, torch.Tensor)
        wanted = mean.clone()
        snapshotter.step(step)
        run.forward()  # changes the running mean at once
        assert not torch.equal(mean, wanted)
        run.optimizer.step()
    snapshotter.close()
    found, fresh = restored(socket, "buffers")
    assert found == 2
    assert torch.equal(fresh.model[1].running_mean, wanted)  # type: ignore[arg-type]  # a buffer


def test_whatever_changes_right_after_step_is_named_and_never_committed(socket: str) -> None:
    run = Run()
    snapshotter = Snapshotter(run.state, job="torn", socket=socket, on_error="raise")
    run.step()
    snapshotter.step(0)
    snapshotter.wait(timeout_s=WAIT_S)
    wanted = copy.deepcopy(run.model.state_dict())
    snapshotter.step(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(3)
    with pytest.raises(SnapshotSkippedError, match=r"model/0\.\w+: changed while it was copied"):
        snapshotter.wait(timeout_s=WAIT_S)
    assert snapshotter.stats()["committed_step"] == 0
    with contextlib.suppress(SnapshotSkippedError):  # told once more, where the daemon's word came after ours
        snapshotter.close()
    found, fresh = restored(socket, "torn")
    assert found == 0
    assert all(torch.equal(fresh.model.state_dict()[key], wanted[key]) for key in wanted)


class Many:
    """Small tensors alone, of odd sizes, and who changes one of them where no optimizer sees it."""

    def __init__(self, value: float) -> None:
        self.model = nn.ParameterList([torch.full((size,), value, device="cuda") for size in (1, 3, 700, 4096) * 50])
        self.model.append(torch.full((700_001,), value, device="cuda", dtype=torch.bfloat16))
        self.state = {"model": self.model}

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model:
                parameter.fill_(value)

    def values(self) -> set[float]:
        return {value for parameter in self.model for value in parameter.detach().float().unique().tolist()}


def many_restored(socket: str, job: str) -> tuple[int | None, set[float]]:
    fresh = Many(-1.0)
    with Snapshotter(fresh.state, job=job, socket=socket, on_error="raise") as snapshotter:
        return snapshotter.restore(), fresh.values()


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "lists"])
def test_small_tensors_are_gathered_as_they_are(socket: str, monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    if not kernel:
        monkeypatch.setattr(Moves, "of", lambda *_: None)
    many, job = Many(0.0), f"many-{kernel}"
    snapshotter = Snapshotter(many.state, job=job, socket=socket, on_error="raise")
    for step in range(3):
        many.fill(float(step))
        snapshotter.step(step)
        snapshotter.before_update()
    many.fill(7.0)
    snapshotter.close()
    assert many_restored(socket, job) == (2, {2.0})


def test_small_tensors_that_change_right_after_step_are_as_they_were_at_it(socket: str) -> None:
    many = Many(0.0)
    snapshotter = Snapshotter(many.state, job="at-once", socket=socket, on_error="raise")
    for step in range(3):
        many.fill(float(step))
        snapshotter.step(step)
        many.fill(float(step) + 0.5)  # nobody asks before
    snapshotter.close()
    assert many_restored(socket, "at-once") == (2, {2.0})


def test_a_replaced_tensor_is_followed(socket: str) -> None:
    many = Many(0.0)
    snapshotter = Snapshotter(many.state, job="replaced", socket=socket, on_error="raise")
    snapshotter.step(0)
    for step in (1, 2):
        snapshotter.before_update()
        many.fill(float(step))
        many.model[5].data = torch.full_like(many.model[5], step + 0.25)  # other memory, the same parameter
        many.model[6] = nn.Parameter(torch.full_like(many.model[6], step + 0.5))  # another parameter
        torch.cuda.empty_cache()
        snapshotter.step(step)
    snapshotter.close()
    assert many_restored(socket, "replaced") == (2, {2.0, 2.25, 2.5})


def test_a_tensor_that_lost_its_memory_costs_its_snapshot_and_not_the_run(socket: str) -> None:
    many = Many(0.0)
    snapshotter = Snapshotter(many.state, job="freed", socket=socket, on_error="raise")
    snapshotter.step(0)
    snapshotter.wait(timeout_s=WAIT_S)
    for index in (3, len(many.model) - 1):
        storage = many.model[index].untyped_storage()
        size_bytes = storage.nbytes()
        storage.resize_(0)
        torch.cuda.empty_cache()
        with pytest.raises(StateError, match="has no memory"):
            snapshotter.step(1)
        torch.cuda.synchronize()
        storage.resize_(size_bytes)
    many.fill(2.0)
    snapshotter.step(2)
    snapshotter.close()
    assert many_restored(socket, "freed") == (2, {2.0})


def test_a_tensor_that_loses_its_memory_before_it_is_copied_costs_its_snapshot(socket: str) -> None:
    many, gate = Many(0.0), threading.Event()
    snapshotter = Snapshotter(many.state, job="late", socket=socket, on_error="raise")
    snapshotter.step(0)
    snapshotter.wait(timeout_s=WAIT_S)
    snapshotter._stager.submit(lambda: gate.wait(WAIT_S))  # the staging thread is late
    snapshotter.step(1)
    storage = many.model[-1].untyped_storage()
    size_bytes = storage.nbytes()
    storage.resize_(0)
    torch.cuda.empty_cache()
    gate.set()
    with pytest.raises(SnapshotSkippedError, match="memory of 1 tensors was given back"):
        snapshotter.wait(timeout_s=WAIT_S)
    storage.resize_(size_bytes)
    many.fill(2.0)
    snapshotter.step(2)
    with contextlib.suppress(SnapshotSkippedError):  # told once more, where the daemon's word came after ours
        snapshotter.close()
    assert many_restored(socket, "late") == (2, {2.0})


def test_tensors_of_every_kind_and_place_come_back(socket: str) -> None:
    class Holder:
        def __init__(self, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            kinds = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float16]
            self.tree: dict[str, object] = {
                f"{kind}-{size}-{device}": torch.randint(0, 99, (size,), generator=generator).to(kind).to(device)
                for kind in kinds for size in (0, 1, 3, 1000, 300_001) for device in ("cpu", "cuda")
            }  # fmt: skip
            image = torch.randint(0, 99, (4, 8, 64, 600), generator=generator).float().cuda()
            self.tree |= {
                "scalar": image[0, 0, 0, 0].clone(), "transposed": image[0, 0].t(), "odd": image[:, 1:3],
                "channels_last": image.to(memory_format=torch.channels_last), "float8": image.to(torch.float8_e4m3fn),
            }  # fmt: skip

        def state_dict(self) -> dict[str, object]:
            return self.tree

        def load_state_dict(self, tree: dict[str, object]) -> None:
            self.tree = tree

    kept = Holder(1)
    snapshotter = Snapshotter({"data": kept}, job="kinds", socket=socket, on_error="raise")
    snapshotter.step(0)
    snapshotter.close()
    fresh = Holder(2)
    with Snapshotter({"data": fresh}, job="kinds", socket=socket, on_error="raise") as again:
        assert again.restore() == 0
    assert fresh.tree.keys() == kept.tree.keys()
    for name, tensor in kept.tree.items():
        found = fresh.tree[name]
        assert isinstance(found, torch.Tensor)
        assert isinstance(tensor, torch.Tensor)
        assert found.device == tensor.device, name
        assert torch.equal(found.view(torch.uint8) if "float8" in name else found,
                           tensor.view(torch.uint8) if "float8" in name else tensor), name  # fmt: skip


def test_memory_is_registered_once_and_given_back(socket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    snapshotter = Snapshotter(run.state, job="registered", socket=socket, on_error="raise")
    run.step()
    for step in range(5):
        snapshotter.step(step)
        run.step()
    registered = dict(snapshotter._stager._registered)
    snapshotter.wait(timeout_s=WAIT_S)
    assert snapshotter._stager._registered == registered
    assert len(registered) == 2
    assert not any(each.problem for each in registered.values())
    pinned = [torch.from_numpy(each._view).is_pinned() for each in registered.values()]
    assert all(pinned)
    snapshotter.close()
    assert not snapshotter._stager._registered
