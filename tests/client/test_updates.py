"""Counting an optimizer's steps."""

import gc
import weakref

import torch
from holdfast.client.updates import counter_of


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
