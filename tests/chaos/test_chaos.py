"""A minute of faults on real daemons by default; `make chaos MINUTES=30` for a night's worth."""

import pytest
from chaos.chaos import run

pytestmark = [pytest.mark.integration, pytest.mark.chaos]


def test_everything_is_restored_after_each_of_a_few_faults() -> None:
    assert run(seed=7, turns=3).total() == 3
