"""Counts the steps that an optimizer began: the sign that parameters are changing.

Version counters alone do not tell: optimizers with ``foreach`` or ``fused`` kernels change DTensors
without counting anywhere (measured with torch 2.13, where the default single-tensor path counts).

The count rises in a step pre-hook. Whoever makes that step wait for a copy in progress must have
registered its own pre-hook earlier, since hooks run in the order they were registered.
"""

from weakref import WeakKeyDictionary

import torch


class UpdateCounter:
    """How many steps one optimizer has begun since it was first asked about."""

    __slots__ = ("begun_count",)

    def __init__(self) -> None:
        self.begun_count = 0

    def __call__(self, *_: object) -> None:
        """Be the optimizer's step pre-hook."""
        self.begun_count += 1


_counters: "WeakKeyDictionary[torch.optim.Optimizer, UpdateCounter]" = WeakKeyDictionary()


def counter_of(optimizer: torch.optim.Optimizer) -> UpdateCounter:
    """The optimizer's counter; the first call hooks it in, for as long as the optimizer lives."""
    counter = _counters.get(optimizer)
    if counter is None:
        counter = _counters[optimizer] = UpdateCounter()
        optimizer.register_step_pre_hook(counter)
    return counter
