"""These tests need a Slurm and minutes: they run when they are asked for, by `make slurm-test`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what these tests share lies beside them


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slurm" in (config.option.markexpr or ""):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="minutes long: make slurm-test"))
