"""Names that no wrapper changes."""

import pytest
import torch
from holdfast.client.manifest import parse_shard
from holdfast.client.names import canonical_names, parameter_names
from holdfast.client.shard import ShardLayout
from torch import nn


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        (["a.weight", "b"], ["a.weight", "b"]),
        (["module.a.weight", "module.b"], ["a.weight", "b"]),
        (["module.module.a"], ["a"]),
        (["module.a", "b"], ["module.a", "b"]),  # a module of the user's that is called so
        (["module._orig_mod.a._checkpoint_wrapped_module.w", "module.b"], ["a.w", "b"]),
        ([], []),
    ],
)
def test_wrappers_are_not_part_of_a_name(given: list[str], canonical: list[str]) -> None:
    assert list(canonical_names(given).values()) == canonical


def test_an_optimizers_parameters_have_the_names_that_its_module_gives_them() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    alone = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD(
        [{"params": [model[1].weight]}, {"params": [alone, model[0].bias]}], lr=0.1, momentum=0.9
    )
    other = torch.optim.SGD([alone], lr=0.1)
    state = {"model": model, "optimizer": optimizer, "other": other}
    expected = {"optimizer": ("1.weight", "", "0.bias")}
    assert parameter_names(state) == expected
    layout = ShardLayout.build(state)
    shard = bytearray(layout.shard_bytes)
    layout.capture().write(memoryview(shard))
    assert parse_shard(memoryview(shard)).manifest.parameters == expected
