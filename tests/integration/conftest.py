"""Clusters of real daemons for the tests of this folder, and one check after all: no process is left behind."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what these tests share lies beside them

from local_cluster import LocalCluster
from rank_process import RankProcess

MakeCluster = Callable[..., LocalCluster]
MakeRank = Callable[..., RankProcess]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    """Makes clusters that end with the test."""
    with ExitStack() as stack:

        def make(**options: object) -> LocalCluster:
            return stack.enter_context(LocalCluster(**options))  # type: ignore[arg-type]  # LocalCluster checks them

        yield make


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes with parity 1 for tests that leave a cluster as they found it."""
    with LocalCluster(nodes=3, parity=1, remote=True) as shared:
        shared.start()
        yield shared


@pytest.fixture
def make_rank() -> Iterator[MakeRank]:
    """Starts training processes that end with the test."""
    with ExitStack() as stack:

        def make(**options: object) -> RankProcess:
            return stack.enter_context(RankProcess(**options))  # type: ignore[arg-type]  # RankProcess checks them

        yield make
