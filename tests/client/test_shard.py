"""Laying a state out, capturing it and writing it: what is copied when, and what is refused."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from holdfast.client import shard as shard_module
from holdfast.client.lanes import Pack
from holdfast.client.manifest import TensorEntry, parse_shard
from holdfast.client.shard import Capture, ShardLayout
from holdfast.client.state_errors import LayoutChangedError, StateError, TornSnapshotError
from torch import nn


class Holder:
    """Anything with a state."""

    def __init__(self, tree: object) -> None:
        self.tree = tree

    def state_dict(self) -> object:
        return self.tree

    def load_state_dict(self, tree: object) -> None:
        self.tree = tree


class Run:
    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.data = Holder({"position": 0, "seen": torch.zeros(2)})
        self.state = {"model": self.model, "optimizer": self.optimizer, "data": self.data}
        self.step()

    def step(self) -> None:
        self.model(torch.randn(4, 3)).pow(2).sum().backward()
        self.optimizer.step()


def written(layout: ShardLayout, capture: Capture | None = None) -> bytes:
    target = bytearray(b"\xff" * layout.shard_bytes)
    (capture or layout.capture()).write(memoryview(target))
    return bytes(target)


def entries(shard: bytes) -> dict[str, TensorEntry]:
    tensors = parse_shard(memoryview(shard)).manifest.tensors
    return {"/".join(map(str, entry.path)): entry for entry in tensors}


def tensor_bytes(shard: bytes, name: str) -> bytes:
    entry = entries(shard)[name]
    payload = parse_shard(memoryview(shard)).payload
    return bytes(payload[entry.offset : entry.offset + entry.size_bytes])


def test_the_shard_holds_every_tensor_and_describes_itself() -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    shard = written(layout)
    assert layout.shard_bytes % 64 == 0
    assert layout.manifest in shard
    weight = run.model.get_parameter("0.weight").detach().numpy().tobytes()
    assert tensor_bytes(shard, "model/0.weight") == weight
    assert entries(shard)["model/0.weight"].lazy
    assert not entries(shard)["model/1.running_mean"].lazy
    assert entries(shard)["optimizer/state/0/exp_avg"].shape == (3, 3)


def test_equal_states_have_interchangeable_layouts() -> None:
    first, second = ShardLayout.build(Run().state), ShardLayout.build(Run().state)
    assert first.digest == second.digest
    assert first.shard_bytes == second.shard_bytes
    assert ShardLayout.build({"model": Run().model}).digest != first.digest


def test_every_byte_of_the_target_is_written_alike() -> None:
    layout = ShardLayout.build(Run().state)
    first = written(layout)
    second = bytearray(layout.shard_bytes)
    layout.capture().write(memoryview(second))
    assert first == second


def test_what_changes_in_forward_is_copied_at_once() -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    mean = run.model.get_buffer("1.running_mean").clone()
    capture = layout.capture()
    run.model(torch.randn(4, 3))  # moves the running mean and draws from the generator
    run.data.tree = {"position": 9, "seen": run.data.tree["seen"].fill_(7)}  # type: ignore[index]  # a dict
    shard = written(layout, capture)
    assert tensor_bytes(shard, "model/1.running_mean") == mean.numpy().tobytes()
    assert tensor_bytes(shard, "data/seen") == torch.zeros(2).numpy().tobytes()
    assert capture.lazy_bytes == sum(entry.size_bytes for entry in entries(shard).values() if entry.lazy)
    assert capture.eager_bytes + capture.lazy_bytes <= layout.shard_bytes


def test_a_step_during_the_copy_is_noticed() -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    capture = layout.capture()
    run.step()
    with pytest.raises(TornSnapshotError, match=r"^model/0.weight: changed .*before_update"):
        written(layout, capture)
    assert written(layout)


def test_a_step_that_counts_no_versions_is_noticed() -> None:
    class Silent(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]  # never given one
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(1)  # as fused kernels on DTensors do: no version is counted

    model = nn.Linear(2, 2)
    optimizer = Silent(model.parameters(), lr=0.1)
    layout = ShardLayout.build({"model": model, "optimizer": optimizer})
    capture = layout.capture()
    optimizer.step()
    with pytest.raises(TornSnapshotError, match=r"^optimizer \(a step began\)"):
        written(layout, capture)


def test_a_change_of_one_tensor_in_the_middle_of_the_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    capture = layout.capture()
    last = run.optimizer.state[run.model.get_parameter("1.bias")]["exp_avg"]
    gather = Pack.gather

    def gather_and_change(pack: Pack) -> None:
        gather(pack)
        last.add_(1)

    monkeypatch.setattr(Pack, "gather", gather_and_change)
    with pytest.raises(TornSnapshotError, match="optimizer/state/3/exp_avg"):
        written(layout, capture)


def add_parameter(run: Run) -> None:
    run.model.append(nn.Linear(3, 1))


def drop_tensor(run: Run) -> None:
    run.data.tree = {"position": 1}


def rename_tensor(run: Run) -> None:
    run.data.tree = {"position": 1, "other": torch.zeros(2)}


def change_shape(run: Run) -> None:
    run.data.tree = {"position": 1, "seen": torch.zeros(3)}


def change_dtype(run: Run) -> None:
    run.model.double()


def grow_objects(run: Run) -> None:
    run.data.tree = {"position": "x" * 100_000, "seen": torch.zeros(2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_parameter, "model/2.weight: a new tensor"),
        (drop_tensor, "data/seen: the tensor is gone"),
        (rename_tensor, "data/other: a new tensor"),
        (change_shape, r"data/seen: expected float32 \[2\], found float32 \[3\]"),
        (change_dtype, r"model/0.weight: expected float32 \[3, 3\], found float64"),
    ],
)
def test_a_changed_layout_is_noticed_and_a_new_one_fits(change: Callable[[Run], None], words: str) -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    layout.capture()
    change(run)
    with pytest.raises(LayoutChangedError, match=f"^(the )?{words}"):
        layout.capture()
    fresh = ShardLayout.build(run.state)
    assert written(fresh)


def test_plain_objects_that_outgrow_their_room_are_noticed_by_the_copy_and_need_a_new_layout() -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    grow_objects(run)
    for _ in range(2):  # while it writes, and then at once
        with pytest.raises(LayoutChangedError, match=r"^the plain objects grew to"):
            written(layout, layout.capture())
    assert written(ShardLayout.build(run.state))


def test_optimizer_state_that_appears_is_a_new_layout() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    layout = ShardLayout.build({"model": model, "optimizer": optimizer})
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(LayoutChangedError, match="optimizer/state/0/step: a new tensor"):
        layout.capture()


def test_tensors_that_move_to_other_memory_are_followed() -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    run.data.tree = {"position": 1, "seen": torch.full((2,), 5.0)}
    with torch.no_grad():
        run.model[0].weight.data = torch.full((3, 3), 6.0)
    shard = written(layout)
    assert tensor_bytes(shard, "data/seen") == torch.full((2,), 5.0).numpy().tobytes()
    assert tensor_bytes(shard, "model/0.weight") == torch.full((3, 3), 6.0).numpy().tobytes()


def test_tied_tensors_are_stored_once_until_they_part() -> None:
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    model[1].weight = model[0].weight
    layout = ShardLayout.build({"model": model})
    capture = layout.capture()
    assert capture.lazy_bytes == 8 * 8 * 4
    offsets = {entry.offset for entry in entries(written(layout, capture)).values()}
    assert len(offsets) == 1
    model[1].weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(LayoutChangedError, match=r"model/1.weight: no longer shares its memory with model/0.weight"):
        layout.capture()


def test_no_more_heads_are_kept_than_named() -> None:
    layout = ShardLayout.build(Run().state)
    captures = [layout.capture() for _ in range(4)]
    for capture in captures:
        written(layout, capture)
    assert len(layout._heads) == shard_module.HEADS_KEPT


def test_shrinking_objects_leave_nothing_behind() -> None:
    holder = Holder({"text": "secret" * 3000})  # more than the rest of the archive
    layout = ShardLayout.build({"data": holder})
    assert b"secret" in written(layout)
    holder.tree = {"text": ""}
    assert b"secret" not in written(layout)


@pytest.mark.parametrize(
    "target",
    [lambda size: memoryview(bytearray(size - 1)), lambda size: memoryview(bytes(size))],
    ids=["too short", "read-only"],
)
def test_a_target_that_does_not_fit_is_refused(target: Callable[[int], memoryview]) -> None:
    layout = ShardLayout.build(Run().state)
    with pytest.raises(StateError, match=f"expected {layout.shard_bytes} bytes of writable"):
        layout.capture().write(target(layout.shard_bytes))


def test_a_capture_is_written_once() -> None:
    layout = ShardLayout.build(Run().state)
    capture = layout.capture()
    written(layout, capture)
    with pytest.raises(StateError, match="written before"):
        written(layout, capture)


def test_nothing_holds_the_target_even_when_it_was_torn() -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    capture = layout.capture()
    run.step()
    memory = bytearray(layout.shard_bytes)
    target = memoryview(memory)
    with pytest.raises(TornSnapshotError) as caught:
        capture.write(target)
    target.release()
    memory.append(0)  # raises BufferError while anything still looks at it
    assert caught.value


def test_writing_in_another_thread_gives_the_same_bytes() -> None:
    layout = ShardLayout.build(Run().state)
    target = bytearray(layout.shard_bytes)
    capture = layout.capture()
    thread = threading.Thread(target=capture.write, args=(memoryview(target),))
    thread.start()
    thread.join(30)
    assert bytes(target) == written(layout)


def test_a_layout_lets_go_of_the_state() -> None:
    run = Run()
    layout = ShardLayout.build(run.state)
    written(layout)
    gone = weakref.ref(run.model[0].weight)
    del run, layout
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"model": nn.Linear(2, 2, device="meta")}, "model/weight: is on the meta device"),
        ({"x": object()}, "x: expected a tensor or"),
        ({3: torch.ones(1)}, "3: expected a string"),
        ({"data": Holder({"now": object()})}, "data/now: a builtins.object would not be readable"),
    ],
)
def test_what_cannot_be_staged_is_refused_at_build(state: dict[str, object], words: str) -> None:
    with pytest.raises(StateError, match=f"^{words}"):
        ShardLayout.build(state)


def test_plain_objects_beyond_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "OBJECTS_BYTES_MAX", 1 << 20)
    with pytest.raises(StateError, match=f"at most {1 << 19} are admitted"):
        ShardLayout.build({"data": Holder({"text": "x" * (1 << 20)})})
