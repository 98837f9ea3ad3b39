"""A durable copy put back into a live state, bit for bit, or refused before anything was changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from holdfast.client.durable import load_copy
from holdfast.client.state_errors import MalformedShardError, RestoreMismatchError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def live(*, seed: int, steps: int = 0, columns: int = 6) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(columns, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    for _ in range(steps):
        model(torch.randn(4, columns)).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "extra": torch.full((3,), float(seed))}


def save(state: dict[str, Any], folder: Path) -> None:
    whole = {name: item if isinstance(item, torch.Tensor) else item.state_dict() for name, item in state.items()}
    dcp.save(whole, checkpoint_id=folder, no_dist=True)


def seen(state: dict[str, Any]) -> Any:
    moments = state["optimizer"].state_dict()
    return (
        {name: value.tolist() for name, value in state["model"].state_dict().items()},
        {index: {key: value.tolist() for key, value in row.items()} for index, row in moments["state"].items()},
        moments["param_groups"],
        state["scheduler"].state_dict(),
        state["extra"].tolist(),
    )


def test_everything_comes_back_also_into_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    before = live(seed=1, steps=2)
    save(before, tmp_path / "copy")
    for steps in (0, 1):
        after = live(seed=2, steps=steps)
        load_copy(after, tmp_path / "copy")
        assert seen(after) == seen(before)
        assert type(after["scheduler"].milestones) is type(before["scheduler"].milestones)


def test_a_wrapped_module_takes_the_same_copy(tmp_path: Path) -> None:
    before = live(seed=1, steps=1)
    save(before, tmp_path / "copy")
    after = live(seed=2, steps=1)
    plain = after["model"]
    wrapped = torch.nn.Module()
    wrapped.module = plain
    load_copy(after | {"model": wrapped}, tmp_path / "copy")
    assert seen(after) == seen(before)


def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    save(live(seed=1, steps=1), tmp_path / "copy")
    other = live(seed=2, steps=1, columns=7)
    before = seen(other)
    with pytest.raises(RestoreMismatchError, match=r"model\.0\.weight: float32 \[5, 6\] in the copy, float32 \[5, 7\]"):
        load_copy(other, tmp_path / "copy")
    del other["extra"]
    with pytest.raises(RestoreMismatchError, match="extra: only in the copy"):
        load_copy(other, tmp_path / "copy")
    more = live(seed=2) | {"more": torch.zeros(2)}
    with pytest.raises(RestoreMismatchError, match="more: not in the copy"):
        load_copy(more, tmp_path / "copy")
    assert seen(other | {"extra": torch.full((3,), 2.0)}) == before


def test_files_that_can_not_be_read_are_said(tmp_path: Path) -> None:
    with pytest.raises(MalformedShardError, match="can't be read"):
        load_copy(live(seed=1), tmp_path / "none")
    save(live(seed=1), tmp_path / "copy")
    for file in (tmp_path / "copy").glob("*.distcp"):
        file.write_bytes(b"x")
    with pytest.raises(MalformedShardError, match="can't be read"):
        load_copy(live(seed=2), tmp_path / "copy")
