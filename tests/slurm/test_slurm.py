"""The batch script on a real Slurm: training survives a killed rank and a lost node, whose slot a spare takes.

Run by `make slurm-test`: needs root, Debian's slurm-wlm and munge, and two minutes.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, until

ROOT = Path(__file__).parents[2]
STEPS = 150
SLOTS = 3

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(420),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd and munged run as root here"),
    pytest.mark.skipif(
        any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in ("slurmctld", "munged")),
        reason="no Slurm here: apt-get install slurm-wlm munge",
    ),
]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path, nodes=SLOTS + 1) as cluster:
        yield cluster


def records(folder: Path, rank: int) -> list[dict[str, object]]:
    file = folder / f"rank-{rank}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def committed(folder: Path) -> int:
    """The newest step that every rank knows to be committed in its newest life; -1 if there is none."""
    newest = [(records(folder, rank) or [{}])[-1].get("committed") for rank in range(SLOTS)]
    return min((int(str(one)) if one is not None else -1) for one in newest)


def lives(folder: Path) -> int:
    return min(sum(record["event"] == "start" for record in records(folder, rank)) for rank in range(SLOTS))


def test_training_survives_a_killed_rank_and_a_lost_node(slurm: SlurmCluster, tmp_path: Path) -> None:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOLDFAST_SLOTS": str(SLOTS),
        "HOLDFAST_SHARED": str(tmp_path),
        "HOLDFAST_ADDRESS": f"127.{os.getpid() % 250}.7.{{index}}1:7400",
        "HOLDFAST_MEMORY_BUDGET": "64MiB",
        "HOLDFAST_MEMORY_CHUNK_BYTES": "64KiB",
        "HOLDFAST_PROBE_S": "15",
        "MASTER_ADDR": "127.0.0.1",
        "HOLDFAST_MASTER_PORT": str(31000 + os.getpid() % 900),
        "OMP_NUM_THREADS": "1",
    }
    log = tmp_path / "job.log"
    sent = slurm.command(
        "sbatch", f"--nodes={SLOTS + 1}", f"--output={log}", "--export=ALL",
        str(ROOT / "deploy" / "slurm" / "holdfast.sbatch"), str(ROOT / "tests" / "slurm" / "train.py"), str(tmp_path),
        str(STEPS), environment=environment,
    )  # fmt: skip
    assert "Submitted" in sent

    try:
        until(lambda: committed(tmp_path) >= 5, "the first commits", seconds=90)
        before = committed(tmp_path)
        os.kill(int(str(records(tmp_path, 1)[-1]["pid"])), signal.SIGKILL)
        until(lambda: lives(tmp_path) == 2, "all ranks start again", seconds=90)
        assert all(int(str(start_of(tmp_path, rank, 1))) >= before for rank in range(SLOTS))

        until(lambda: committed(tmp_path) >= before + 10, "commits after the restart", seconds=60)
        before = committed(tmp_path)
        slurm.lose(str(records(tmp_path, 1)[-1]["host"]))
        until(lambda: lives(tmp_path) == 3, "all ranks start again, one of them on the spare", seconds=150)
        restored = {start_of(tmp_path, rank, 2) for rank in range(SLOTS)}
        assert len(restored) == 1
        assert int(str(restored.pop())) >= before
        assert records(tmp_path, 1)[-1]["host"] == f"n{SLOTS + 1}"
        until(lambda: "done, status 0" in log.read_text(), "training ends", seconds=90)
    except AssertionError as error:
        daemons = "\n".join(file.read_text()[-1500:] for file in tmp_path.glob("holdfast-*/daemon-*.log"))
        raise AssertionError(f"{error}\n{log.read_text()[-3000:] if log.exists() else ''}\n{daemons}") from error

    for rank in range(SLOTS):  # a step that was taken twice came out the same, to the bit
        hashes: dict[object, set[object]] = {}
        for record in records(tmp_path, rank):
            if record["event"] == "step":
                hashes.setdefault(record["step"], set()).add(record["sha256"])
        assert sorted(hashes, key=lambda step: int(str(step))) == list(range(STEPS))
        assert all(len(one) == 1 for one in hashes.values())


def start_of(folder: Path, rank: int, life: int) -> object:
    return [record["step"] for record in records(folder, rank) if record["event"] == "start"][life]
