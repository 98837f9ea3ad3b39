"""Whole clusters in one thread, each from one seed: faults, then rest; every promise checked after every event."""

import pytest

from sim.scenario import run

SEEDS = (2, 3, 7, 8, 13, 15, 16, 19, 23, 29, 30, 31, 32)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cluster_keeps_its_promises(seed: int) -> None:
    outcome = run(seed)
    assert outcome.commits > 0
    assert outcome.restores > 0
