"""Whole clusters under faults: the seeds that once failed or are cheap, and a few that nobody has tried."""

import secrets

import pytest
from sim.mutations import CAUGHT_BY, Mutation
from sim.scenario import PROFILES, ScenarioError, run

# Seeds below 10 seconds of one core all together; every group size and parity is among them.
SEEDS = (
    *(("everything", seed) for seed in (2, 4, 7, 8, 13, 15, 16, 19, 22, 2000010)),
    *(("restarts", seed) for seed in (2, 4, 7, 8, 13, 14, 15, 18, 22, 2000011, 9500090, 12001641, 12002591, 14100011)),
    *(("losses", seed) for seed in (2, 4, 6, 7, 8, 13, 15, 1002936)),
    *(("reads", seed) for seed in (2, 7, 8)),
    ("strays", 18000247),
    *(("crashes", seed) for seed in (1, 2, 4, 7, 8, 13, 15)),
    *(("long", seed) for seed in (0, 2)),
    *(("beyond", seed) for seed in (2, 5)),
    *(("growth", seed) for seed in (1, 3, 5, 7, 35)),
    *(
        ("few", seed)
        for seed in (
            13000423,
            14000083,
            18000152,
            18000204,
            8000454,
            8000466,
            8000707,
            9000572,
            9000875,
            9500303,
            9500812,
            10000126,
            10000176,
        )
    ),
)


@pytest.mark.parametrize(("profile", "seed"), SEEDS)
def test_a_cluster_keeps_its_promises_under_faults_and_makes_progress_after_them(profile: str, seed: int) -> None:
    outcome = run(seed, profile)
    assert outcome.commits > 0
    assert outcome.restores > 1


def test_seeds_that_nobody_has_tried(request: pytest.FixtureRequest) -> None:
    for _ in range(request.config.getoption("--sim-fresh")):
        run(
            secrets.randbelow(1 << 32), secrets.choice(sorted(set(PROFILES) - {"wide"}))
        )  # wide ones take too long here


def test_the_same_seed_plays_the_same_run() -> None:
    assert run(2, "everything") == run(2, "everything")


@pytest.mark.parametrize(("mutation", "profile", "seed"), CAUGHT_BY, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_rule_is_caught(mutation: Mutation, profile: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    with pytest.raises(ScenarioError, match=r"broken promise|crash: AssertionError"):  # the latter: an invariant
        run(seed, profile)
