"""These tests need root, namespaces and a minute: they run when they are asked for, by `make names-test`."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.names)
            if "names" not in (config.option.markexpr or ""):
                item.add_marker(pytest.mark.skip(reason="a minute, as root: make names-test"))
