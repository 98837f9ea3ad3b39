"""What tells of a change of a tensor, and what is not said of a state that stayed the same."""

from collections.abc import Callable

import pytest
import torch
from holdfast.client.signs import Signs
from holdfast.client.updates import UpdateCounter
from torch import nn


class Watched:
    def __init__(self) -> None:
        self.tensors = [nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))]
        self.counter = UpdateCounter()
        self.signs = Signs(["a", "b", "c"], self.tensors, self.tensors, {"optimizer": self.counter})


def in_place(watched: Watched) -> None:
    with torch.no_grad():
        watched.tensors[1].mul_(2)


def other_memory(watched: Watched) -> None:
    watched.tensors[1].data = torch.ones(3)


def through_a_view(watched: Watched) -> None:
    watched.tensors[1].detach()[1:].zero_()


@pytest.mark.parametrize("change", [in_place, other_memory, through_a_view])
def test_a_change_is_told_by_name(change: Callable[[Watched], None]) -> None:
    watched = Watched()
    noted = watched.signs.now()
    assert watched.signs.changed_since(noted) == []
    change(watched)
    assert watched.signs.changed_since(noted) == ["b"]


def test_an_update_that_begins_is_told() -> None:
    watched = Watched()
    noted = watched.signs.now()
    watched.counter()
    assert watched.signs.changed_since(noted) == ["optimizer (a step began)"]


def test_reading_is_no_change() -> None:
    watched = Watched()
    noted = watched.signs.now()
    (watched.tensors[0].sum() * 2).backward()
    assert watched.tensors[0].clone().shape == (4, 6)
    assert watched.signs.changed_since(noted) == []
