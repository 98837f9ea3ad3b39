"""The shared random generators go on as if nothing had happened."""

import io
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from holdfast.client.rng import capture_rng, restore_rng
from holdfast.client.state_errors import MalformedShardError


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    before = capture_rng()
    yield
    restore_rng(before)


def draw() -> list[float]:
    numbers = [float(torch.rand(())), float(torch.randn(())), random.random(), random.gauss(0, 1)]
    return [*numbers, float(np.random.rand()), float(np.random.randn())]


def test_generators_give_what_they_would_have_given() -> None:
    draw()  # leaves half a pair of normal numbers behind in each generator
    states = capture_rng()
    expected = [draw() for _ in range(3)]
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    restore_rng(torch.load(buffer, weights_only=True))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("name", ["torch", "python", "numpy"])
@pytest.mark.parametrize("value", [None, 7, b"", (1, 2, 3), ("MT19937", b"12", 0, 0, 0.0), (3, b"12", None)])
def test_a_state_of_another_kind_is_refused(name: str, value: object) -> None:
    with pytest.raises(MalformedShardError, match="random generator"):
        restore_rng({**capture_rng(), name: value})


def test_missing_states_are_refused() -> None:
    with pytest.raises(MalformedShardError, match="random generator"):
        restore_rng({})
