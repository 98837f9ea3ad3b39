"""When an optimizer's step begins to change parameters: who must know it first, and how often it happened.

Version counters alone do not tell: optimizers with ``foreach`` or ``fused`` kernels change DTensors
without counting anywhere (measured with torch 2.13, where the default single-tensor path counts).

The count rises as an update begins. Whoever makes that update wait for a copy in progress must have
asked to be called earlier, since calls are made in the order they were asked for.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch.utils.hooks import RemovableHandle

_TORCHS_OWN = "torch.optim."


class UpdateCounter:
    """How many updates one optimizer has begun since it was first asked about."""

    __slots__ = ("begun_count",)

    def __init__(self) -> None:
        self.begun_count = 0

    def __call__(self) -> None:
        """An update begins."""
        self.begun_count += 1


def before_updates(optimizer: torch.optim.Optimizer, call: Callable[[], None]) -> RemovableHandle:
    """Have `call` made in each of the optimizer's steps before it changes anything; the handle ends it.

    A step with a closure (Lightning gives one to each) computes forward and backward inside the step: torch's own
    optimizers change nothing before the closure has returned, so `call` is made then, not before minutes of work that
    a copy could go on beside. Other optimizers may change parameters before they call the closure (SAM does).
    """

    def hook(
        optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure) or not type(optimizer).__module__.startswith(_TORCHS_OWN):
            call()
            return None

        def closure_then_call(*inputs: object) -> object:
            result = closure(*inputs)
            call()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_call}
        return (args[0], closure_then_call, *args[2:]), kwargs

    return optimizer.register_step_pre_hook(hook)


def weakly(method: Callable[[], None]) -> Callable[[], None]:
    """A call of a bound method that keeps nobody alive, and does nothing once its object is gone."""
    reference = WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call


_counters: "WeakKeyDictionary[torch.optim.Optimizer, UpdateCounter]" = WeakKeyDictionary()


def counter_of(optimizer: torch.optim.Optimizer) -> UpdateCounter:
    """The optimizer's counter; the first call hooks it in, for as long as the optimizer lives."""
    counter = _counters.get(optimizer)
    if counter is None:
        counter = _counters[optimizer] = UpdateCounter()
        before_updates(optimizer, counter)
    return counter
