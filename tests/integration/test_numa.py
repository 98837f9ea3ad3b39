"""A real daemon on a machine that it takes for one with two memory nodes: the arena lies where the rank runs."""

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from holdfast.client import Snapshotter
from holdfast.daemon.shell.numa import KNOWN_AFTER_S_MAX
from local_cluster import LocalCluster

MakeCluster = Callable[..., LocalCluster]
CPU = min(os.sched_getaffinity(0))
NOWHERE = 4096  # a processor that no machine has

# Read by Python before anything else, in the daemon's processes: they see another machine.
SEEN = """
import holdfast.daemon.shell.numa as numa
from pathlib import Path
numa._SYS = Path({folder!r})
numa.Topology.__init__.__defaults__ = (numa._SYS,)
"""


@pytest.fixture
def on_one_cpu() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CPU})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/self/numa_maps").exists(), reason="a kernel without memory nodes"
)
@pytest.mark.usefixtures("on_one_cpu")
@pytest.mark.parametrize(("near", "policy"), [(0, "prefer:0"), (None, "default")])
def test_the_arena_lies_where_the_rank_runs(
    make_cluster: MakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: int | None, policy: str
) -> None:
    cpulists = {0: str(CPU), 1: str(NOWHERE)} if near == 0 else {0: str(NOWHERE), 1: str(NOWHERE + 1)}
    for node, cpus in cpulists.items():
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    (tmp_path / "sitecustomize.py").write_text(SEEN.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    with Snapshotter({"s": torch.ones(1 << 20)}, job="near", socket=cluster.socket(0), on_error="raise") as snapshotter:
        snapshotter.step(0)
        snapshotter.wait(timeout_s=20)
        lines = Path(f"/proc/{cluster.worker(0)}/numa_maps").read_text().splitlines()
    policies = [line.split()[1] for line in lines if "holdfast-data" in line]
    if near == 0 and "prefer:0" not in policies:
        pytest.skip("this kernel, or who confines us, takes no such wish")
    assert policies
    assert set(policies) <= {policy, "default"}  # beyond the shard the last chunk is nobody's
    assert KNOWN_AFTER_S_MAX < 1.0  # what a rank that never plans costs the others
