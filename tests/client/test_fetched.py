"""What is read at once can't be superseded while it is written; what does not fit is read piece by piece."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from holdfast.client import fetched as room
from holdfast.client.errors import SupersededError
from holdfast.client.export import write_checkpoint
from holdfast.client.fetched import fetched, free_bytes
from memory_shards import Source, staged

pytestmark = pytest.mark.filterwarnings(r"ignore:torch\.distributed is .*, assuming the intent")


def test_a_newer_commit_does_not_matter_once_all_is_read(tmp_path: Path) -> None:
    weight = torch.arange(1000)
    source = Source([staged({"weight": weight})])
    held = fetched(source, room_bytes=1 << 20)
    source.superseded_after = 0
    write_checkpoint(held, tmp_path / "out", note={})
    live = {"weight": torch.zeros(1000, dtype=torch.int64)}
    dcp.load(live, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(live["weight"], weight)
    with pytest.raises(SupersededError):
        fetched(source, room_bytes=1 << 20)


def test_what_does_not_fit_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source([staged({"weight": torch.arange(1000)})])
    assert fetched(source, room_bytes=len(source.shards[0]) - 1) is source
    assert source.ranges == []
    assert free_bytes() > 0
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "none")
    assert fetched(source) is source
