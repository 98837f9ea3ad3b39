"""Taking a state apart and putting it together again."""

import datetime as dt
from collections import Counter, OrderedDict, defaultdict

import pytest
import torch
from holdfast.client.flatten import DEPTH_MAX, Rules, check_tensor, flatten, state_of, unflatten
from holdfast.client.manifest import Path
from holdfast.client.state_errors import MalformedShardError, StateError
from hypothesis import given
from hypothesis import strategies as st

PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.binary(max_size=3)
)
KEYS = st.text(max_size=2) | st.integers(-3, 3) | st.none()
TENSORS = st.integers(0, 3).map(torch.arange)
TREES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


def same(left: object, right: object) -> bool:
    """Equality that knows tensors; they must be the same objects."""
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


@given(TREES)
def test_a_state_put_together_is_the_one_taken_apart(tree: object) -> None:
    flat = flatten("it", tree, Rules())
    tensors: dict[Path, torch.Tensor] = {leaf.path: leaf.tensor for leaf in flat.leaves}
    tensors["another",] = torch.ones(1)
    assert same(unflatten(flat.objects, tensors, "it"), tree)


def test_dicts_of_tensors_cost_the_objects_nothing() -> None:
    tree = {"state": {0: {"exp": torch.ones(1)}, 1: OrderedDict(exp=torch.ones(1))}, "lr": 0.5}
    flat = flatten("optimizer", tree, Rules())
    assert flat.objects == {"state": None, "lr": 0.5}
    assert [leaf.path for leaf in flat.leaves] == [("optimizer", "state", 0, "exp"), ("optimizer", "state", 1, "exp")]


def test_the_kind_of_a_dict_is_kept() -> None:
    flat = flatten("it", OrderedDict(a=1, b=torch.ones(1), c=Counter("aab")), Rules())
    tree = unflatten(flat.objects, {leaf.path: leaf.tensor for leaf in flat.leaves}, "it")
    assert type(tree) is OrderedDict
    assert type(tree["c"]) is Counter


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({"a": [1, defaultdict(list)]}, "it/a/1: a collections.defaultdict"),
        ({"when": dt.timedelta(1)}, "it/when: a datetime.timedelta"),
        ({(1, 2): torch.ones(1)}, "it: a tensor lies under the key"),
        ({1 << 70: torch.ones(1)}, "it: a tensor lies under the key"),
        ({float("nan"): torch.ones(1)}, "it: a tensor lies under the key"),
        ({frozenset(): 1}, "it: the key"),
    ],
)
def test_what_could_not_be_read_again_is_refused_with_its_path(tree: object, where: str) -> None:
    with pytest.raises(StateError, match=rf"^{where.replace('(', '.')}"):
        flatten("it", tree, Rules())


def test_allow_pickle_admits_what_pickles() -> None:
    tree = {"when": dt.timedelta(1)}
    assert flatten("it", tree, Rules(allow_pickle=True)).objects == tree


def test_a_state_that_contains_itself_is_refused() -> None:
    tree: dict[str, object] = {}
    tree["self"] = tree
    with pytest.raises(StateError, match=f"deeper than {DEPTH_MAX}"):
        flatten("it", tree, Rules())


@pytest.mark.parametrize(
    ("objects", "paths"),
    [
        (None, [("it", "a"), ("it", "a", "b")]),
        (None, [("it", "a", "b"), ("it", "a")]),
        (None, [("it",), ("it", "a")]),
        ({"a": 1}, [("it",)]),
        ({"a": 1}, [("it", "a")]),
        ({"a": 1}, [("it", "a", "b")]),
        ({"a": 1}, [("it", "b")]),
        ([None], [("it", 1)]),
        (7, [("it", "a")]),
    ],
)
def test_tensors_that_do_not_fit_the_objects_are_refused(objects: object, paths: list[Path]) -> None:
    with pytest.raises(MalformedShardError, match=r"^it"):
        unflatten(objects, dict.fromkeys(paths, torch.ones(1)), "it")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "dense tensor"),
    ],
)
def test_tensors_without_plain_bytes_are_refused(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(StateError, match=rf"^a/b: .*{words}"):
        check_tensor(("a", "b"), tensor)


@pytest.mark.filterwarnings("ignore")  # torch may be about to give them up
def test_a_quantised_tensor_is_refused_with_what_to_give_instead() -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 10, torch.quint8)
    with pytest.raises(StateError, match=r"^a/b: a quantised tensor \(torch.quint8\): give int_repr"):
        check_tensor(("a", "b"), tensor)


def test_only_tensors_and_stateful_objects_are_states() -> None:
    assert state_of("t", tensor := torch.ones(1)) is tensor
    assert state_of("m", torch.nn.Linear(1, 1)).keys() == {"weight", "bias"}  # type: ignore[attr-defined]  # a dict
    for odd in ({"a": 1}, 3, torch.nn.Linear):
        with pytest.raises(StateError, match=r"^x: expected a tensor or an object with state_dict\(\)"):
            state_of("x", odd)
