"""Options of the whole test run."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-transcripts", action="store_true", help="write what was said instead of comparing it")
    parser.addoption("--sim-fresh", type=int, default=2, help="runs of the simulator with seeds that were never tried")
