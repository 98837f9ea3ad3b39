"""Putting a shard back: training goes on bit for bit, or nothing was changed."""

import gc
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from holdfast.client.manifest import HEADER_BYTES, Mesh, Sharding, encode_manifest, parse_shard, plan_header
from holdfast.client.restore import hash_state, restore_into
from holdfast.client.rng import capture_rng
from holdfast.client.shard import ShardLayout
from holdfast.client.state_errors import MalformedShardError, RestoreMismatchError, ShardError, StateError
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

PROGRAM = Path(__file__).with_name("rank_program.py")
RANKS_TIMEOUT_S = 100


class Loader:
    """Data that depends on a position and on two generators."""

    def __init__(self) -> None:
        self.position = 0
        self.history: list[object] = []

    def batch(self) -> torch.Tensor:
        self.position += 1
        self.history.append((self.position, random.random(), {"numpy": float(np.random.rand())}))
        return torch.randn(6, 3, 4, 3) + self.position

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position, "history": self.history, "weights": {3: torch.arange(self.position % 2 + 1)}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.position = state["position"]  # type: ignore[assignment]  # what state_dict gave
        self.history = state["history"]  # type: ignore[assignment]  # as above


class Run:
    def __init__(self, seed: int, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 5)
        ).to(memory_format=memory_format)  # type: ignore[call-overload]  # one of the formats that torch takes
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        warm_up, decay = LinearLR(self.optimizer, total_iters=3), CosineAnnealingLR(self.optimizer, 10)
        self.scheduler = SequentialLR(self.optimizer, [warm_up, decay], [3])
        self.data = Loader()
        self.plain = torch.zeros(3, 2).t()
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.data,
            "plain": self.plain,
        }

    def step(self) -> float:
        loss = self.model(self.data.batch()).pow(2).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.plain.add_(loss.detach())
        return float(loss.detach())


def snapshot(state: dict[str, object], *, allow_pickle: bool = False) -> bytes:
    layout = ShardLayout.build(state, allow_pickle=allow_pickle)
    target = bytearray(layout.shard_bytes)
    layout.capture().write(memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("steps_before", [0, 2], ids=["fresh optimizer", "optimizer with state"])
def test_training_goes_on_bit_for_bit(steps_before: int, memory_format: torch.memory_format) -> None:
    run = Run(1, memory_format)
    for _ in range(4):
        run.step()
    shard, saved_hash = snapshot(run.state), hash_state(run.state)
    expected = [run.step() for _ in range(5)]
    fresh = Run(2, memory_format)
    for _ in range(steps_before):
        fresh.step()
    weight = fresh.model[0].weight
    restore_into(fresh.state, memoryview(shard))
    assert hash_state(fresh.state) == saved_hash
    assert fresh.model[0].weight is weight
    first = fresh.optimizer.state[weight]["exp_avg"]
    assert first.stride() == run.optimizer.state[run.model[0].weight]["exp_avg"].stride()
    assert [fresh.step() for _ in range(5)] == expected
    assert hash_state(fresh.state) == hash_state(run.state)


def test_a_snapshot_before_the_first_step_empties_the_optimizer() -> None:
    run = Run(1)
    shard, saved_hash = snapshot(run.state), hash_state(run.state)
    run.step()
    restore_into(run.state, memoryview(shard))
    assert hash_state(run.state) == saved_hash
    assert not run.optimizer.state_dict()["state"]


def test_nothing_live_aliases_the_shard() -> None:
    run = Run(1)
    run.step()
    shard = bytearray(snapshot(run.state))
    fresh = Run(2)
    view = memoryview(shard)
    restore_into(fresh.state, view)
    before = hash_state(fresh.state)
    shard[:] = b"\xff" * len(shard)
    assert hash_state(fresh.state) == before
    view.release()
    gc.collect()
    shard.append(0)  # raises BufferError while anything still looks at it


def test_state_kept_in_another_dtype_than_its_parameter_keeps_it() -> None:
    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = nn.Linear(3, 3, bias=False, dtype=torch.bfloat16)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = build()
    momentum = torch.randn(3, 3, dtype=torch.float32)
    optimizer.state[model.weight]["momentum_buffer"] = momentum
    shard = snapshot({"model": model, "optimizer": optimizer})
    model, optimizer = build()
    restore_into({"model": model, "optimizer": optimizer}, memoryview(shard))
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], momentum)
    assert optimizer.state[model.weight]["momentum_buffer"].dtype == torch.float32


def test_tied_weights_come_back_tied() -> None:
    def build() -> nn.ModuleList:
        model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
        model[1].weight = model[0].weight
        return model

    model, fresh = build(), build()
    restore_into({"model": fresh}, memoryview(snapshot({"model": model})))
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(*(each.get_parameter("0.weight") for each in (fresh, model)))
    untied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    with pytest.raises(RestoreMismatchError, match="share memory live, not in the shard"):
        restore_into({"model": fresh}, memoryview(snapshot({"model": untied})))


def other_names(state: dict[str, object]) -> None:
    state["model"] = nn.Sequential(nn.Linear(2, 2))


def more_layers(state: dict[str, object]) -> None:
    model = state["model"]
    assert isinstance(model, nn.Sequential)
    model.append(nn.Linear(5, 5))


def other_shape(state: dict[str, object]) -> None:
    state["plain"] = torch.zeros(3, 3)


def other_dtype(state: dict[str, object]) -> None:
    state["plain"] = torch.zeros(2, 3, dtype=torch.int32)


def more_parts(state: dict[str, object]) -> None:
    state["more"] = torch.zeros(1)


def fewer_parts(state: dict[str, object]) -> None:
    del state["plain"]


def other_groups(state: dict[str, object]) -> None:
    model = state["model"]
    assert isinstance(model, nn.Module)
    first, *rest = model.parameters()
    state["optimizer"] = torch.optim.AdamW([{"params": [first]}, {"params": rest}])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_names, "model/0.weight: float32"),
        (more_layers, "model/5.weight: not in the shard"),
        (other_shape, r"plain: float32 \[2, 3\] in the shard, float32 \[3, 3\] live"),
        (other_dtype, r"plain: float32 \[2, 3\] in the shard, int32 \[2, 3\] live"),
        (more_parts, "more: not in the shard"),
        (fewer_parts, "plain: only in the shard"),
        (other_groups, r"optimizer/param_groups: \[6\] parameters per group in the shard, \[1, 5\] live"),
    ],
)
def test_a_shard_of_another_state_is_refused_whole(change: Callable[[dict[str, object]], None], words: str) -> None:
    run = Run(1)
    run.step()
    shard = snapshot(run.state)
    state: dict[str, object] = dict(Run(2).state)
    change(state)
    before, generators = hash_state(state), torch.get_rng_state()
    with pytest.raises(RestoreMismatchError, match=words):
        restore_into(state, memoryview(shard))
    assert hash_state(state) == before
    assert torch.equal(torch.get_rng_state(), generators)


def test_a_module_with_another_extra_state_is_refused_before_anything_changed() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> int:
            return 1

        def set_extra_state(self, state: int) -> None:
            pass

    live = nn.Linear(2, 2)
    before = hash_state({"model": live})
    with pytest.raises(RestoreMismatchError, match="model/_extra_state: only on one side"):
        restore_into({"model": live}, memoryview(snapshot({"model": Extra(2, 2)})))
    assert hash_state({"model": live}) == before


def test_a_live_state_without_memory_is_refused() -> None:
    shard = snapshot({"model": nn.Linear(2, 2)})
    with pytest.raises(StateError, match="model/weight: is on the meta device"):
        restore_into({"model": nn.Linear(2, 2, device="meta")}, memoryview(shard))


class Foreign:
    """A class that a restricted load refuses."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Foreign)

    __hash__ = None  # type: ignore[assignment]  # never a key


class Holder:
    def __init__(self, tree: object) -> None:
        self.tree = tree

    def state_dict(self) -> object:
        return self.tree

    def load_state_dict(self, tree: object) -> None:
        self.tree = tree


def test_foreign_classes_are_read_only_where_that_was_allowed() -> None:
    shard = snapshot({"data": Holder({"it": Foreign()})}, allow_pickle=True)
    fresh = Holder({})
    with pytest.raises(MalformedShardError, match="plain objects cannot be read"):
        restore_into({"data": fresh}, memoryview(shard))
    assert fresh.tree == {}
    restore_into({"data": fresh}, memoryview(shard), allow_pickle=True)
    assert fresh.tree == {"it": Foreign()}


def with_objects(record: object) -> bytes:
    """A well-formed shard of one tensor whose objects are ``record``."""
    from holdfast.client.flatten import save_objects  # noqa: PLC0415 - used by this forger alone

    shard = snapshot({"plain": torch.zeros(2)})
    header = parse_shard(memoryview(shard)).header
    objects = save_objects(record)
    forged = bytearray(shard)
    forged[:HEADER_BYTES] = header._replace(objects_bytes=len(objects)).pack()
    forged[header.objects_offset : header.objects_offset + len(objects)] = objects
    return bytes(forged)


@pytest.mark.parametrize(
    "record",
    [
        [],
        {"objects": []},
        {"objects": {}, "rng": {}},
        {"objects": {"other": None}, "rng": {}},
        {"objects": {"plain": {}}, "rng": {}},
        {"objects": {"plain": 1}, "rng": {}},
    ],
)
def test_objects_that_contradict_the_manifest_are_refused(record: object) -> None:
    live = torch.ones(2)
    with pytest.raises(MalformedShardError):
        restore_into({"plain": live}, memoryview(with_objects(record)))
    assert torch.equal(live, torch.ones(2))


HOSTILE = snapshot({"model": nn.Linear(2, 2), "data": Holder({"a": [1, (2, torch.ones(2))]})})
DESCRIBED_BYTES = parse_shard(memoryview(HOSTILE)).header.objects_offset + 2048


@settings(max_examples=150, deadline=None)
@given(st.integers(0, DESCRIBED_BYTES), st.binary(min_size=1, max_size=16), st.booleans())
def test_hostile_shards_never_do_worse_than_an_error(position: int, damage: bytes, cut: bool) -> None:
    forged = bytearray(HOSTILE)
    forged[position : position + len(damage)] = damage[: len(forged) - position]
    if cut:
        del forged[-64:]
    state = {"model": nn.Linear(2, 2), "data": Holder({})}
    before = capture_rng()
    try:
        restore_into(state, memoryview(bytes(forged)))
    except ShardError:
        pass
    finally:
        torch.set_rng_state(before["torch"])  # type: ignore[arg-type]  # a tensor


def with_entries(**changes: object) -> bytes:
    """HOSTILE with another description of the tensor that the data holds."""
    parsed = parse_shard(memoryview(HOSTILE))
    mesh = Mesh(device_type="cpu", shape=(1,), dim_names=None, ranks=(0,))
    tensors = tuple(
        replace(entry, **changes) if entry.path[0] == "data" else entry for entry in parsed.manifest.tensors
    )
    encoded = encode_manifest(replace(parsed.manifest, meshes=(mesh,), tensors=tensors))
    old = parsed.header
    header = plan_header(len(encoded), old.objects_capacity_bytes, parsed.manifest.payload_bytes)
    forged = bytearray(header.shard_bytes)
    forged[:HEADER_BYTES] = header._replace(objects_bytes=old.objects_bytes).pack()
    forged[HEADER_BYTES : HEADER_BYTES + len(encoded)] = encoded
    forged[header.objects_offset :] = HOSTILE[old.objects_offset :]
    return bytes(forged)


def test_a_mesh_that_nobody_lives_on_is_refused() -> None:
    sharding = Sharding(global_shape=(2,), global_offset=(0,), placements=("shard:0",), mesh_index=0)
    with pytest.raises(RestoreMismatchError, match="data/a/1/1: no live tensor lies on a mesh"):
        restore_into({"model": nn.Linear(2, 2), "data": Holder({})}, memoryview(with_entries(sharding=sharding)))


def test_a_tensor_that_torch_cannot_make_is_refused() -> None:
    forged = with_entries(shape=(0, 1 << 62, 1 << 62), size_bytes=0)
    with pytest.raises(MalformedShardError, match="impossible tensor"):
        restore_into({"model": nn.Linear(2, 2), "data": Holder({})}, memoryview(forged))


def run_ranks(half: str, folder: Path) -> list[dict[str, Any]]:
    """Run both ranks of the program to their end; what each printed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), half, str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=RANKS_TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors
    return [json.loads(output) for output, _ in outputs]


@pytest.mark.integration
def test_two_ranks_go_on_bit_for_bit_in_fresh_processes(tmp_path: Path) -> None:
    uninterrupted, restored = run_ranks("save", tmp_path), run_ranks("restore", tmp_path)
    for before, after in zip(uninterrupted, restored, strict=True):
        assert before["torn"] is True
        for mode in ("fsdp", "ddp"):
            for what in ("saved", "final", "losses"):
                assert after[mode][what] == before[mode][what], (mode, what)
        assert "at [" in str(after["fsdp"]["refused"])
    assert restored[0]["fsdp"]["final"] != restored[1]["fsdp"]["final"]
