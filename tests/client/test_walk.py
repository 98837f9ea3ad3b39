"""The cheap second look at a state must see everything that the first look would."""

from collections.abc import Callable

import pytest
import torch
from holdfast.client.flatten import Flat, Rules, flatten
from holdfast.client.walk import ModuleWatch, StateWalker, memory_key
from torch import nn


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))


def walker_of(**state: object) -> StateWalker:
    return StateWalker(state, Rules())


def test_an_unchanged_module_is_not_asked_again() -> None:
    walker = walker_of(model=model())
    assert walker.walk()["model"] is walker.walk()["model"]


def replace_parameter(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(torch.ones(3, 3))


def swap_memory(module: nn.Sequential) -> None:
    module[0].weight.data = torch.ones(3, 3)


def add_buffer(module: nn.Sequential) -> None:
    module[0].register_buffer("extra", torch.ones(1))


def add_module(module: nn.Sequential) -> None:
    module.append(nn.Linear(2, 2))


def drop_parameter(module: nn.Sequential) -> None:
    module[0].bias = None  # type: ignore[assignment]  # torch allows it


def fill_empty_place(module: nn.Sequential) -> None:
    module[2].bias = nn.Parameter(torch.ones(2))


def replace_buffer(module: nn.Sequential) -> None:
    module[1].running_mean = torch.ones(3)


def grow_in_place(module: nn.Sequential) -> None:
    module.get_buffer("1.running_mean").resize_(2)


@pytest.mark.parametrize(
    "change",
    [
        replace_parameter,
        swap_memory,
        add_buffer,
        add_module,
        drop_parameter,
        fill_empty_place,
        replace_buffer,
        grow_in_place,
    ],
)
def test_every_change_of_a_module_is_seen(change: Callable[[nn.Sequential], None]) -> None:
    module = model()
    walker = walker_of(model=module)
    first = walker.walk()["model"]
    change(module)
    second = walker.walk()["model"]
    assert second is not first
    expected = module.state_dict()
    assert [leaf.path[1] for leaf in second.leaves] == list(expected)
    for leaf in second.leaves:
        assert memory_key(leaf.tensor) == memory_key(expected[str(leaf.path[1])])


def test_a_module_with_state_of_its_own_kind_is_always_asked() -> None:
    class Extra(nn.Linear):
        count = 0

        def get_extra_state(self) -> int:
            self.count += 1
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    module = Extra(2, 2)
    assert ModuleWatch.of(module, flatten("it", module.state_dict(), Rules())) is None
    walker = walker_of(model=module)
    first, second = walker.walk()["model"], walker.walk()["model"]
    assert first.objects != second.objects


def test_only_parameters_and_optimizer_slots_are_lazy() -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.1))
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    walker = walker_of(model=module, optimizer=optimizer, plain=torch.ones(2))
    flats = walker.walk()
    lazy = walker.lazy_keys(flats)
    named = {
        "/".join(map(str, leaf.path)): memory_key(leaf.tensor) in lazy
        for flat in flats.values()
        for leaf in flat.leaves
    }
    assert {name for name, is_lazy in named.items() if not is_lazy} == {
        "model/1.running_mean",
        "model/1.running_var",
        "model/1.num_batches_tracked",
        "optimizer/param_groups/0/lr",
        "plain",
    }


def trained() -> tuple[nn.Sequential, torch.optim.AdamW]:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def same(first: Flat, second: Flat) -> bool:
    paths = [[leaf.path for leaf in flat.leaves] for flat in (first, second)]
    keys = [[memory_key(leaf.tensor) for leaf in flat.leaves] for flat in (first, second)]
    return paths[0] == paths[1] and keys[0] == keys[1] and first.objects == second.objects


def new_rate(optimizer: torch.optim.AdamW) -> None:
    optimizer.param_groups[0]["lr"] = 0.25


def new_slot(optimizer: torch.optim.AdamW) -> None:
    next(iter(optimizer.state.values()))["extra"] = torch.ones(2)


def plain_slot(optimizer: torch.optim.AdamW) -> None:
    next(iter(optimizer.state.values()))["count"] = 3


def replaced_slot(optimizer: torch.optim.AdamW) -> None:
    next(iter(optimizer.state.values()))["exp_avg"] = torch.ones(3, 3)


def moved_slot(optimizer: torch.optim.AdamW) -> None:
    next(iter(optimizer.state.values()))["exp_avg"].data = torch.ones(3, 3)


def dropped_state(optimizer: torch.optim.AdamW) -> None:
    optimizer.state.pop(next(iter(optimizer.state)))


def loaded(optimizer: torch.optim.AdamW) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def new_group(optimizer: torch.optim.AdamW) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 3.0})


def tensor_rate(optimizer: torch.optim.AdamW) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)


def hook(optimizer: torch.optim.AdamW) -> None:
    optimizer.register_state_dict_post_hook(lambda _, tree: {**tree, "more": 1})


@pytest.mark.parametrize(
    "change",
    [new_rate, new_slot, plain_slot, replaced_slot, moved_slot, dropped_state, loaded, new_group, tensor_rate],
)
def test_an_optimizer_is_seen_as_its_state_dict_tells_it(change: Callable[[torch.optim.AdamW], None]) -> None:
    _, optimizer = trained()
    walker = walker_of(optimizer=optimizer)
    first = walker.walk()["optimizer"]
    assert walker.walk()["optimizer"].leaves is first.leaves  # not asked again
    change(optimizer)
    for _ in range(2):
        assert same(walker.walk()["optimizer"], flatten("optimizer", optimizer.state_dict(), Rules()))


def test_an_optimizer_with_hooks_is_always_asked() -> None:
    _, optimizer = trained()
    hook(optimizer)
    walker = walker_of(optimizer=optimizer)
    walker.walk()
    assert not walker.watches
    assert walker.walk()["optimizer"].objects == {
        **flatten("optimizer", optimizer.state_dict(), Rules()).objects,  # type: ignore[dict-item]  # a dict
    }


def test_values_that_their_owner_could_change_in_place_are_counted() -> None:
    class Holder:
        def state_dict(self) -> dict[str, object]:
            return {"raw": bytearray(3), "number": 4}

        def load_state_dict(self, _: dict[str, object]) -> None: ...

    walker = walker_of(data=Holder())
    walker.walk()
    assert walker.rules.mutable_count == 1
    walker = walker_of(model=model())
    walker.walk()
    assert walker.rules.mutable_count == 0


@pytest.mark.parametrize("shape", [(1, 9), (9,), (3, 2)])
def test_another_shape_in_the_same_memory_is_seen_by_the_second_look(shape: tuple[int, ...]) -> None:
    module = model()
    walker = walker_of(model=module)
    walker.walk()
    assert not walker.reshaped()
    weight = module[0].weight
    weight.data = weight.data.reshape(-1)[: torch.Size(shape).numel()].view(shape)
    assert walker.reshaped()
    walker.forget()
    assert walker.walk()["model"].leaves[0].tensor.shape == shape


def test_a_transposed_square_is_seen_by_the_second_look() -> None:
    module = model()
    walker = walker_of(model=module)
    walker.walk()
    module[0].weight.data = module[0].weight.data.t()
    assert walker.reshaped()
