"""Counting an optimizer's steps."""

import gc
import weakref
from typing import Any

import pytest
import torch
from holdfast.client.updates import before_updates, counter_of


def test_each_step_counts_once_however_often_it_is_asked_for() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    counter = counter_of(optimizer)
    assert counter_of(optimizer) is counter
    optimizer.step()
    optimizer.step()
    assert counter.begun_count == 2


def test_a_counter_does_not_keep_its_optimizer_alive() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    counter_of(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


class Early(torch.optim.Optimizer):
    """Changes parameters before it calls the closure."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        return closure()


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS, Early])
def test_the_call_comes_before_anything_changes_and_after_the_closure_where_that_can_be(
    kind: Any, by_name: bool
) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight])
    order: list[tuple[str, bool]] = []

    def tell(what: str) -> None:
        order.append((what, bool((weight == 1).all())))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        tell("closure")
        return loss

    first, second = (before_updates(optimizer, lambda name=name: tell(name)) for name in ("first", "second"))
    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert loss.item() > 0
    if kind is Early:
        assert order == [("first", True), ("second", True), ("closure", False)]
    else:
        assert order[:3] == [("closure", True), ("first", True), ("second", True)]
    assert not (weight == 1).all()
    first.remove()
    second.remove()
    order.clear()
    optimizer.step(closure)
    assert {what for what, _ in order} == {"closure"}
