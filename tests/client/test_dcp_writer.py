"""What the writer refuses, and how ranks hear of each other's failures before anything is staged."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from fake_ranks import as_rank
from holdfast.client import dcp_writer
from holdfast.client.dcp import HoldfastWriter
from holdfast.client.dcp_writer import _Line, _Offer
from holdfast.client.errors import HoldfastError, RanksDisagreeError
from holdfast.client.ranks import Ranks
from torch.distributed.checkpoint.planner import SavePlan


def test_saves_that_leave_out_ranks_are_refused() -> None:
    writer = HoldfastWriter(job="x")
    with as_rank(1, 2):
        writer.set_up_storage_writer(False, rank=1, use_collectives=True)
        with pytest.raises(HoldfastError, match="use_collectives=False: expected all ranks"):
            writer.set_up_storage_writer(False, rank=1, use_collectives=False)
        with pytest.raises(HoldfastError, match="torch saves as rank 0, this is rank 1 of 2"):
            writer.set_up_storage_writer(True, rank=0)
    with as_rank(0, 2), pytest.raises(HoldfastError, match="expected the plans of 2 ranks, found 1"):
        writer.prepare_global_plan([SavePlan([])])


def test_what_cannot_name_a_step_or_a_job_is_refused() -> None:
    with pytest.raises(ValueError, match="job: expected"):
        HoldfastWriter(job="")
    writer = HoldfastWriter(job="x")
    with pytest.raises(ValueError, match="expected a step's number at the end"):
        writer.reset("latest")
    writer.reset("run/7")
    assert HoldfastWriter.validate_checkpoint_id("run/7")
    assert not HoldfastWriter.validate_checkpoint_id("latest")


class Told(Ranks):
    """Ranks of which the others say what the test has them say."""

    def __init__(self, others: Callable[[_Offer], list[_Offer]]) -> None:
        self.rank, self.world_size, self.local_rank = 0, 2, 0
        self._others = others

    def exchange(self, payload: bytes) -> list[bytes]:
        mine = msgspec.msgpack.decode(payload, type=_Offer)
        return [payload, *map(msgspec.msgpack.encode, self._others(mine))]


@pytest.fixture
def line_with(tmp_path: Path) -> Iterator[Callable[[Told], _Line]]:
    lines: list[_Line] = []

    def make(ranks: Told) -> _Line:
        lines.append(_Line("x", tmp_path / "absent.sock", ranks))
        return lines[-1]

    yield make
    for line in lines:
        line.close()


def test_one_ranks_failure_is_everybodys(line_with: Callable[[Told], _Line], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_writer, "ATTACH_S", 0.0)
    line = line_with(Told(lambda _: [_Offer("x", problem="w has no bytes")]))
    with pytest.raises(HoldfastError, match="rank 1: w has no bytes"):
        line.stage(None, step=None, problem="")
    with pytest.raises(HoldfastError, match="rank 0: mine; rank 1: w has no bytes"):
        line.stage(None, step=None, problem="mine")
    line = line_with(Told(lambda _: [_Offer("y")]))
    with pytest.raises(RanksDisagreeError, match=r"rank 0 saves for job 'x', others for \['y'\]"):
        line.stage(None, step=None, problem="")
