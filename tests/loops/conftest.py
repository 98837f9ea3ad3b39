"""These tests need other people's libraries and a minute: they run when they are asked for, by `make loops-test`."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

STOP_S = 30.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "loops" in str(config.getoption("markexpr")):
        return
    for item in items:
        if item.get_closest_marker("loops") is not None:
            item.add_marker(pytest.mark.skip(reason="needs other libraries: make loops-test"))


@pytest.fixture(scope="package")
def sockets() -> Iterator[str]:
    """Those of three daemons, as HOLDFAST_SOCKET takes them."""
    command = [sys.executable, "-m", "holdfast.cli.main", "local", "--json", "--nodes", "3", "--parity", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield ",".join(node["socket"] for node in json.loads(process.stdout.readline())["nodes"])
        process.terminate()
        process.wait(STOP_S)
