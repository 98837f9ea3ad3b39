"""Equal bits hash alike, everything else does not."""

from collections import OrderedDict

import pytest
import torch
from holdfast.client.state_hash import hash_state


class Holder:
    def __init__(self, tree: object) -> None:
        self.tree = tree

    def state_dict(self) -> object:
        return self.tree

    def load_state_dict(self, tree: object) -> None:
        self.tree = tree


def of(tree: object) -> str:
    return hash_state({"it": Holder(tree)})


def test_the_hash_is_frozen() -> None:
    tree = {"w": torch.tensor([1.0, 2.0]), "lr": 0.1, "n": [1, None, "a"]}
    assert of(tree) == "359fee7a7b5fb57e9cfbaa57899be5b0ae0ffc0340c0c4e91f2e2f8e89ca4ade"


def test_order_and_kind_of_containers_do_not_count() -> None:
    first = {"a": 1, "b": (2.0, {3}), "t": torch.ones(2), "u": torch.zeros(2)}
    second = OrderedDict(u=torch.zeros(2), t=torch.ones(2), b=[2.0, {3}], a=1)
    assert of(first) == of(second)


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([1.0, 2.0]), "lr": 0.25},
        {"w": torch.tensor([1.0, -2.0]), "lr": 0.5},
        {"w": torch.tensor([[1.0, 2.0]]), "lr": 0.5},
        {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "lr": 0.5},
        {"v": torch.tensor([1.0, 2.0]), "lr": 0.5},
        {"w": torch.tensor([1.0, 2.0]), "lr": "0.5"},
        {"w": torch.tensor([1.0, 2.0]), "lr": 0.5, "more": None},
    ],
)
def test_any_difference_counts(other: object) -> None:
    assert of(other) != of({"w": torch.tensor([1.0, 2.0]), "lr": 0.5})


def test_negative_zero_is_another_bit() -> None:
    assert of({"x": 0.0}) != of({"x": -0.0})
