"""The examples do what their first lines say, against `holdfast local`, as a user starts them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.cli.cluster import clean_environment

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_S = 100.0  # a tenth of it on idle cores
STOP_S = 30.0


@pytest.fixture(scope="module")
def sockets() -> Iterator[str]:
    """`holdfast local`, and what it says to export."""
    command = [sys.executable, "-m", "holdfast.cli.main", "local", "--json", "--nodes", "3", "--parity", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield ",".join(node["socket"] for node in told["nodes"])
        process.terminate()
        process.wait(STOP_S)


def run(sockets: str, *command: str) -> str:
    """What an example printed."""
    added = {"HOLDFAST_SOCKET": sockets, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command],
        env=clean_environment(added),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_plain_loop_goes_on_where_it_ended(sockets: str) -> None:
    loop = str(EXAMPLES / "plain_loop.py")
    first = run(sockets, loop, "--steps", "21", "--job", "halves")
    assert "starting anew" in first
    second = run(sockets, loop, "--steps", "41", "--job", "halves")
    assert "restored step 20" in second
    whole = run(sockets, loop, "--steps", "41", "--job", "whole")
    assert losses(first) | losses(second) == losses(whole)  # bit for bit, as far as six digits tell
    assert "'committed_step': 40" in second


def test_fsdp2_comes_back_on_fewer_ranks_and_is_loaded_without_training(sockets: str) -> None:
    def torchrun(ranks: int, *arguments: str) -> str:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        return run(sockets, *launcher, str(EXAMPLES / "fsdp2_reshard.py"), *arguments)

    first = torchrun(2, "--steps", "3")
    assert "starting anew" in first
    second = torchrun(1, "--steps", "4", "--load-first")
    assert sums(second)["loaded step 2 on 1"] == sums(first)["trained on 2"]
    assert sums(second)["restored on 1"] == sums(first)["trained on 2"]
    assert sums(second)["trained on 1"] != sums(first)["trained on 2"]


def sums(printed: str) -> dict[str, str]:
    return dict(re.findall(r"^(.+ on \d+) ranks, sum (.+)$", printed, re.MULTILINE))


def losses(printed: str) -> set[str]:
    return set(re.findall(r"step \d+ loss [\d.]+", printed))
