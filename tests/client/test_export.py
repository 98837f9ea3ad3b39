"""What is exported is read by torch's own reader, whoever held which part; what can't be put together is refused."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_ranks import Cut, as_rank, cut
from holdfast.client.errors import NotRecoverableError, SupersededError
from holdfast.client.export import NOTE, export, told, write_checkpoint
from holdfast.client.ranges import Committed
from holdfast.client.state_errors import RestoreMismatchError
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.ids import SnapshotId
from memory_shards import Source, staged
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard

pytestmark = pytest.mark.filterwarnings(r"ignore:torch\.distributed is .*, assuming the intent")

TENSORS = {
    "even": torch.arange(12 * 8, dtype=torch.float32).view(12, 8),
    "odd": torch.arange(7 * 5, dtype=torch.int64).view(7, 5) + 1,
    "few": torch.arange(2, dtype=torch.bfloat16) + 1,
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("layout", [cut(4), cut(2, 2, by=(Replicate(), Shard(1))), cut(3, by=(Shard(1),))], ids=str)
def test_parts_of_all_ranks_become_whole_tensors(layout: Cut, tmp_path: Path) -> None:
    shards = []
    for rank in range(layout.world_size):
        with as_rank(rank, layout.world_size):
            shards.append(staged(layout.state(TENSORS)))
    write_checkpoint(Source(shards), tmp_path / "out", note={"step": 7})
    assert json.loads((tmp_path / "out" / NOTE).read_text()) == {"schema": "holdfast.export/1", "step": 7}
    live = {name: torch.full_like(tensor, 9) for name, tensor in TENSORS.items()}
    dcp.load(live, checkpoint_id=tmp_path / "out", no_dist=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(live[name], tensor), name


def test_model_and_optimizer_keep_their_names_and_plain_values(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    write_checkpoint(Source([staged({"model": model, "optimizer": optimizer})]), tmp_path / "out", note={})
    live = {"model": nn.Linear(3, 2).state_dict(), "optimizer": torch.optim.AdamW(model.parameters()).state_dict()}
    live["optimizer"]["state"] = {0: {"exp_avg": torch.zeros(2, 3), "step": torch.tensor(0.0)}}
    dcp.load(live, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(live["model"][name], value) for name, value in model.state_dict().items())
    assert torch.equal(live["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert live["optimizer"]["param_groups"][0]["lr"] == 0.125


def test_a_partial_sum_is_refused_by_name(tmp_path: Path) -> None:
    layout = cut(2, by=(Partial(),))
    shards = []
    for rank in range(2):
        with as_rank(rank, 2):
            shards.append(staged(layout.state({"even": TENSORS["even"]})))
    with pytest.raises(RestoreMismatchError, match="partial sum"):
        write_checkpoint(Source(shards), tmp_path / "out", note={})


class Ranges(Source):
    """A reader of one snapshot after the other: each is superseded in the middle, but the last."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__([staged({"weight": torch.arange(1000)})])
        self.steps = steps

    def __enter__(self) -> "Ranges":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def committed(self) -> Committed | None:
        return Committed(1, SnapshotId(1, self.steps[0]), self.layout) if self.steps else None

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        if len(self.steps) > 1:
            self.steps.pop(0)
            raise SupersededError("gone", newest=SnapshotId(1, self.steps[0]))
        super().read_into(role, offset_bytes, target)


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> "list[int]":
    """The steps that are committed one after the other."""
    steps: list[int] = []
    monkeypatch.setattr("holdfast.client.export.RangeReader", lambda **_: Ranges(steps))
    return steps


def test_a_newer_step_is_taken_when_the_one_being_read_is_freed(ranges: list[int], tmp_path: Path) -> None:
    ranges += [1, 2, 3]
    done = export(job="a", to=tmp_path / "deep" / "out")
    assert (done.step, done.job) == (3, "a")
    assert done.size_bytes > 8000
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_steps_that_come_faster_than_they_are_read_end_the_export_and_leave_nothing(
    ranges: list[int], tmp_path: Path
) -> None:
    ranges += range(20)
    with pytest.raises(SupersededError):
        export(job="a", to=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_and_another_step_are_refused(ranges: list[int], tmp_path: Path) -> None:
    with pytest.raises(NotRecoverableError, match="nothing is committed"):
        export(job="a", to=tmp_path / "out")
    ranges.append(4)
    with pytest.raises(NotRecoverableError, match="expected step 3, found step 4"):
        export(job="a", to=tmp_path / "out", step=3)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_taken_is_left_alone(ranges: list[int], tmp_path: Path) -> None:
    ranges.append(4)
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OperatorError, match="is taken"):
        export(job="a", to=tmp_path)
    with pytest.raises(OperatorError, match="is taken"):
        export(job="a", to=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_full_disk_leaves_nothing_behind(ranges: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    ranges.append(4)
    monkeypatch.setattr("holdfast.client.export.sync_directory", full)
    with pytest.raises(OperatorError, match="No space left"):
        export(job="a", to=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_contradicts_itself_ends_the_export_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Ranges([1])
    broken.shards = [b"X" + broken.shards[0][1:]]
    monkeypatch.setattr("holdfast.client.export.RangeReader", lambda **_: broken)
    assert told(lambda: export(job="a", to=tmp_path / "out")) == ExitCode.NOT_RECOVERABLE
    assert "expected a shard's magic" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
