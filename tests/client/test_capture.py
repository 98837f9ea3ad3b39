"""A capture beside a device that copies when the test says so: the planner and the rules that a GPU has, on the CPU."""

import threading
from collections.abc import Callable

import pytest
import torch
from holdfast.client import shard as shard_module
from holdfast.client.capture import Capture
from holdfast.client.lanes import Lane, Piece
from holdfast.client.places import Source
from holdfast.client.restore import restore_into
from holdfast.client.shard import ShardLayout
from holdfast.client.state_errors import LayoutChangedError, TornSnapshotError
from holdfast.client.tensor_bytes import ByteArray, copy_out
from torch import nn


class SlowDevice:
    """A lane whose copies happen later, as a GPU's do, and on the order of the test."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.gathered: list[Piece] = []
        self.waiting: list[Callable[[], None]] = []
        self.passages: list[SlowPassage] = []

    def depart(self) -> "SlowPassage":
        self.passages.append(SlowPassage(self))
        return self.passages[-1]

    def work(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class SlowPassage:
    def __init__(self, device: SlowDevice) -> None:
        self.device, self.done, self.held = device, threading.Event(), 0

    def start(self, payload: ByteArray) -> None:
        def copy() -> None:
            for each in self.device.pieces:
                copy_out(each.local, None, payload[each.offset : each.offset + each.size_bytes])
            self.done.set()

        self.device.waiting.append(copy)

    def hold_updates(self) -> None:
        self.held += 1

    def finished(self) -> bool:
        return self.done.is_set()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SlowDevice:
    """What a layout built from now on copies its lazy tensors with."""
    device = SlowDevice([])

    def lanes_of(sources: list[Source]) -> tuple[Lane | None, list[Lane]]:
        device.pieces = [source.piece for source in sources if source.kind.lazy]
        return None, [device]

    monkeypatch.setattr(shard_module, "lanes_of", lanes_of)
    return device


def model() -> nn.Linear:
    return nn.Linear(300, 200)


def memory(layout: ShardLayout) -> bytearray:
    return bytearray(layout.shard_bytes)


def weight_in(shard: bytearray, net: nn.Linear) -> bool:
    return net.weight.detach().numpy().tobytes() in bytes(shard)


def test_start_returns_before_the_device_is_done_and_finish_after(device: SlowDevice) -> None:
    net = model()
    layout = ShardLayout.build({"model": net})
    capture, shard = layout.capture(), memory(layout)
    assert not capture.on_host
    capture.start(memoryview(shard))
    assert not weight_in(shard, net)
    thread = threading.Thread(target=capture.finish)
    thread.start()
    assert thread.is_alive()
    device.work()
    thread.join(30)
    assert not thread.is_alive()
    assert weight_in(shard, net)


def test_the_head_is_written_while_the_device_copies(device: SlowDevice) -> None:
    """Training waits for `start`: what takes the interpreter, and no device, is not in it."""
    net = model()
    layout = ShardLayout.build({"model": net})
    capture, shard = layout.capture(), memory(layout)
    capture.start(memoryview(shard))
    assert not any(shard[: len(layout.manifest)])
    device.work()
    capture.finish()
    assert layout.manifest in bytes(shard)
    wanted, fresh = net.weight.detach().clone(), model()
    restore_into({"model": fresh}, memoryview(shard))
    assert torch.equal(fresh.weight, wanted)


def test_another_shape_beside_a_device_needs_a_new_layout(device: SlowDevice) -> None:
    net = model()
    layout = ShardLayout.build({"model": net})
    net.weight.data = net.weight.data.view(300, 200)
    capture, shard = layout.capture(), memory(layout)
    capture.start(memoryview(shard))
    device.work()
    with pytest.raises(LayoutChangedError, match="a tensor has another shape"):
        capture.finish()
    with pytest.raises(LayoutChangedError, match=r"model/weight: expected float32 \[200, 300\], found .* \[300, 200\]"):
        layout.capture()


def test_updates_that_were_held_do_not_tear(device: SlowDevice) -> None:
    net = model()
    layout = ShardLayout.build({"model": net})
    capture, shard = layout.capture(), memory(layout)
    capture.start(memoryview(shard))
    capture.hold_updates()
    device.work()  # a GPU's queue: the copy comes first, whatever the host has said since
    with torch.no_grad():
        net.weight.add_(1)
    capture.hold_updates()  # a second optimizer
    capture.finish()
    assert device.passages[0].held == 2


@pytest.mark.parametrize("when", ["before the copy began", "while the device copies", "before updates were held"])
def test_a_change_that_nobody_held_tears(device: SlowDevice, when: str) -> None:
    net = model()
    layout = ShardLayout.build({"model": net})
    capture, shard = layout.capture(), memory(layout)
    if when == "before the copy began":
        net.weight.detach().add_(1)
    capture.start(memoryview(shard))
    if when != "before the copy began":
        net.weight.detach().add_(1)
    if when == "before updates were held":
        capture.hold_updates()
    device.work()
    with pytest.raises(TornSnapshotError, match=r"^model/weight: changed .*before_update"):
        capture.finish()


def test_a_capture_that_could_not_start_in_time_never_does(device: SlowDevice) -> None:
    layout = ShardLayout.build({"model": model()})
    capture, shard = layout.capture(), memory(layout)
    capture.hold_updates()  # the training thread has waited long enough
    with pytest.raises(TornSnapshotError, match="update had to go on"):
        capture.start(memoryview(shard))
    assert not device.waiting
    assert capture.settle(timeout_s=0)


def test_a_device_that_hangs_costs_the_snapshot_and_bounded_time(device: SlowDevice) -> None:
    layout = ShardLayout.build({"model": model()})
    capture, shard = layout.capture(), memory(layout)
    capture.start(memoryview(shard))
    with pytest.raises(TornSnapshotError, match="did not copy"):
        capture.finish(timeout_s=0.01)
    assert not capture.settle(timeout_s=0)
    device.work()
    assert capture.settle(timeout_s=0)


def test_another_shape_in_the_same_memory_needs_a_new_layout() -> None:
    net = model()
    layout = ShardLayout.build({"model": net})
    net.weight.data = net.weight.data.view(300, 200)
    capture: Capture = layout.capture()
    with pytest.raises(LayoutChangedError, match="a tensor has another shape"):
        capture.write(memoryview(memory(layout)))
    with pytest.raises(LayoutChangedError, match=r"model/weight: expected float32 \[200, 300\], found .* \[300, 200\]"):
        layout.capture()
