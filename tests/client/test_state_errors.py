"""Every error about a rank's state can be caught as one kind."""

import inspect

from holdfast.client import state_errors


def test_all_errors_have_one_base() -> None:
    kinds = [kind for _, kind in inspect.getmembers(state_errors, inspect.isclass)]
    assert len(kinds) == 7
    assert all(issubclass(kind, state_errors.ShardError) for kind in kinds)
