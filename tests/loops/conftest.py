"""These tests need other people's libraries and a minute: they run when they are asked for, by `make loops-test`."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "loops" in str(config.getoption("markexpr")):
        return
    for item in items:
        if item.get_closest_marker("loops") is not None:
            item.add_marker(pytest.mark.skip(reason="needs other libraries: make loops-test"))
