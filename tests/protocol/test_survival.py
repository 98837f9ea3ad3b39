"""The planning formulas against reference values, enumeration and each other."""

import math
from itertools import combinations

import pytest
from holdfast.protocol import survival
from hypothesis import given
from hypothesis import strategies as st

# REFT's public notebook: 1,024 nodes in groups of 16, Weibull losses with shape 3 and scale 50.
REFT_SURVIVAL = {
    5: (0.359155, 0.992427, 0.999965),
    8: (0.015081, 0.883696, 0.997651),
    10: (0.000277, 0.634876, 0.983362),
}

# Chance that nothing is lost with exactly so many nodes gone: (nodes, lost) -> one for each code.
CODES = ((2, 1), (8, 1), (8, 2), (16, 2), (16, 4))
SURVIVAL_OF_LOSSES = {
    (64, 2): (0.98413, 0.88889, 1, 1, 1),
    (64, 3): (0.95238, 0.68817, 0.98925, 0.94624, 1),
    (256, 3): (0.98824, 0.91894, 0.99935, 0.99676, 1),
    (1024, 3): (0.99707, 0.97955, 0.99996, 0.99980, 1),
    (1024, 4): (0.99414, 0.95940, 0.99984, 0.99920, 1),
}

probabilities = st.floats(0, 1)


@pytest.mark.parametrize("time", REFT_SURVIVAL)
def test_survival_equals_the_papers_notebook(time: int) -> None:
    node_loss = survival.weibull_loss(time, scale=50, shape=3)
    found = [survival.cluster_survival(node_loss, group_sizes=[16] * 64, parity=parity) for parity in range(3)]
    assert found == pytest.approx(REFT_SURVIVAL[time], abs=5e-7)


@pytest.mark.parametrize(("node_count", "lost_count"), SURVIVAL_OF_LOSSES)
def test_survival_of_so_many_losses_equals_the_table(node_count: int, lost_count: int) -> None:
    found = [
        survival.survival_of_losses(lost_count, group_sizes=[size] * (node_count // size), parity=parity)
        for size, parity in CODES
    ]
    assert found == pytest.approx(SURVIVAL_OF_LOSSES[node_count, lost_count], abs=5e-6)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 3), st.data())
def test_survival_of_so_many_losses_equals_enumeration(sizes: list[int], parity: int, data: st.DataObject) -> None:
    group_of = [index for index, size in enumerate(sizes) for _ in range(size)]
    lost_count = data.draw(st.integers(0, len(group_of)))
    patterns = list(combinations(range(len(group_of)), lost_count))
    good = sum(
        all(sum(group_of[node] == group for node in lost) <= parity for group in range(len(sizes))) for lost in patterns
    )
    found = survival.survival_of_losses(lost_count, group_sizes=sizes, parity=parity)
    assert found == pytest.approx(good / len(patterns))


@given(probabilities, st.integers(1, 20), st.integers(0, 20))
def test_a_groups_loss_is_a_probability_that_parity_lowers(node_loss: float, size: int, parity: int) -> None:
    loss = survival.group_loss(node_loss, size=size, parity=parity)
    assert 0 <= loss <= 1 + 1e-12
    assert survival.group_loss(node_loss, size=size, parity=parity + 1) <= loss
    assert survival.group_loss(node_loss, size=size, parity=size) == 0


def test_a_tiny_loss_is_not_rounded_away() -> None:
    assert survival.group_loss(1e-9, size=8, parity=2) == pytest.approx(math.comb(8, 3) * 1e-27)


def test_loss_over_time_begins_at_nothing_and_ends_at_certainty() -> None:
    assert survival.exponential_loss(0, mtbf_h=10) == 0
    assert survival.exponential_loss(10, mtbf_h=10) == pytest.approx(1 - 1 / math.e)
    assert survival.weibull_loss(50, scale=50, shape=3) == pytest.approx(1 - 1 / math.e)
    assert survival.weibull_loss(1e6, scale=50, shape=3) == 1


# 2,048 nodes in groups of 8 over 54 days, one loss per node in 264 days.
@pytest.mark.parametrize(
    ("repair_min", "parity", "expected"), [(5, 1, 0.039), (5, 2, 1.5e-6), (30, 1, 0.23), (30, 2, 5.5e-5)]
)
def test_losses_while_repairing_equal_the_raid_argument(repair_min: int, parity: int, expected: float) -> None:
    found = survival.losses_expected(
        54 * 24, group_sizes=[8] * 256, parity=parity, mtbf_h=264 * 24, repair_h=repair_min / 60
    )
    assert found == pytest.approx(expected, rel=0.02)


def test_without_parity_every_lost_node_counts() -> None:
    assert survival.losses_expected(100, group_sizes=[3, 2], parity=0, mtbf_h=50, repair_h=1) == pytest.approx(10)


@given(st.floats(0, 50))
def test_a_chance_is_never_more_than_the_expectation(expected: float) -> None:
    assert 0 <= survival.loss_probability(expected) <= min(expected, 1)


@pytest.mark.parametrize(("snapshot_s", "interval_s", "wasted"), [(0.1, 47, 0.0042), (1, 149, 0.013), (5, 334, 0.030)])
def test_youngs_interval_equals_worked_examples(snapshot_s: float, interval_s: float, wasted: float) -> None:
    mtbf_s = 3.09 * 3600
    found_s = survival.young_interval_s(snapshot_s, mtbf_s=mtbf_s)
    assert round(found_s) == interval_s
    assert survival.waste(found_s, snapshot_s=snapshot_s, mtbf_s=mtbf_s) == pytest.approx(wasted, abs=5e-4)


@given(st.floats(0.01, 100), st.floats(1000, 1e7), st.floats(0.1, 10))
def test_no_interval_wastes_less_than_youngs(snapshot_s: float, mtbf_s: float, factor: float) -> None:
    best_s = survival.young_interval_s(snapshot_s, mtbf_s=mtbf_s)
    best = survival.waste(best_s, snapshot_s=snapshot_s, mtbf_s=mtbf_s)
    assert best <= survival.waste(best_s * factor, snapshot_s=snapshot_s, mtbf_s=mtbf_s) + 1e-12


def test_dalys_interval_is_youngs_for_cheap_snapshots_and_the_mtbf_for_hopeless_ones() -> None:
    cheap = survival.daly_interval_s(0.1, mtbf_s=1e6)
    assert cheap == pytest.approx(survival.young_interval_s(0.1, mtbf_s=1e6), rel=1e-3)
    assert survival.daly_interval_s(300, mtbf_s=100) == 100
    # The published formula, worked by hand for C = 2 and M = 100: 20 * (1 + 0.1 / 3 + 0.01 / 9) - 2.
    assert survival.daly_interval_s(2, mtbf_s=100) == pytest.approx(18.688889)


def test_waste_is_at_most_everything() -> None:
    assert survival.waste(1, snapshot_s=10, mtbf_s=1) == 1
    assert survival.waste(100, snapshot_s=1, mtbf_s=10000, restart_s=100) == pytest.approx(0.01 + 0.015)


def test_memory_and_traffic_are_the_stripes_own() -> None:
    assert survival.memory_factor(size=8, parity=2) == pytest.approx(4 / 3)
    assert survival.held_bytes(6000, size=8, parity=2, slots=2) == 16000
    assert survival.held_bytes(1, size=8, parity=2, slots=3) == 6  # a byte of parity is the least
    assert survival.held_bytes(1000, size=1, parity=0, slots=2) == 2000
    assert survival.sent_bytes(1000, parity=2) == 2000
    assert survival.rebuilt_bytes(6000, size=8, parity=2) == 8000
