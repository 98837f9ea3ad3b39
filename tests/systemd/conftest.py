"""These tests boot a systemd: they run when they are asked for, by `make systemd-test`."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "systemd" in (config.option.markexpr or ""):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="boots a systemd: make systemd-test"))
