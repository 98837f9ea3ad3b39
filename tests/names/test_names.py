"""Nodes that are names: a replaced one is found at its new address, and nobody is restarted for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def in_namespaces(*words: str) -> list[str]:
    return ["unshare", "--mount", "--net", *words]


def may_unshare() -> bool:
    tools = all(shutil.which(tool) for tool in ("unshare", "ip", "ss", "mount"))
    return tools and os.geteuid() == 0 and subprocess.run(in_namespaces("true"), check=False).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="needs root, namespaces and iproute2: a name server of its own")
@pytest.mark.parametrize("driver", ["names_driver.py", "kubernetes_driver.py"])
def test_a_replacement_is_found_by_its_name(tmp_path: Path, driver: str) -> None:
    command = in_namespaces(sys.executable, str(HERE / driver), str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("ok\n")
