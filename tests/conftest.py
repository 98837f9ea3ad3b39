"""Options of the whole test run."""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-transcripts", action="store_true", help="write what was said instead of comparing it")
    parser.addoption("--sim-fresh", type=int, default=2, help="runs of the simulator with seeds that were never tried")
