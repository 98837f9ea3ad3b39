"""Which memory node a process is near, by a topology that is made up; and the real call, on the node that there is."""

import mmap
import os
import platform
import re
from pathlib import Path

import pytest
from holdfast.daemon.core.actions import Allocate
from holdfast.daemon.core.memory import Memory, Sizes
from holdfast.daemon.shell import numa
from holdfast.daemon.shell.keeping import make_sealed
from holdfast.daemon.shell.numa import Near, Placer, Topology, prefer
from holdfast.protocol.layout import Layout, ShardPlace


def machine(folder: Path, **cpulists: str) -> Topology:
    for name, cpus in cpulists.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "cpulist").write_text(cpus + "\n")
    (folder / "possible").write_text("0-1\n")
    return Topology(folder)


def test_a_process_is_near_the_node_that_has_all_its_processors(tmp_path: Path) -> None:
    two = machine(tmp_path, node0="0-3,8-11", node1="4-7,12-15", node2="")  # node 2 has memory alone
    assert set(two.cpus) == {0, 1}
    assert two.node_with({0, 9}) == 0
    assert two.node_with({15}) == 1
    assert two.node_with({3, 4}) is None
    assert two.node_with({99}) is None


def test_where_there_is_one_node_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", None)
    assert machine(tmp_path / "one", node0="0-7").node_of(os.getpid()) is None
    assert Topology(tmp_path / "none").node_of(os.getpid()) is None
    assert machine(tmp_path / "odd", node0="0-x", node1="8").cpus == {}


def test_the_affinity_of_a_process_decides(tmp_path: Path) -> None:
    own = sorted(os.sched_getaffinity(0))
    here = ",".join(map(str, own))
    assert machine(tmp_path, node0="4096", node1=here).node_of(os.getpid()) == 1
    assert Topology(tmp_path).node_of(0) is None  # of another namespace
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    assert Topology(tmp_path).node_of(gone) is None


class Orders:
    """Who writes, as it becomes known, and what is ordered."""

    def __init__(self, topology: Topology) -> None:
        self.pids: list[int | None] = [None, None]
        self.made: list[tuple[Near, ...]] = []
        self.placer = Placer(topology, lambda _: [(self.pids[0], 0, 10), (self.pids[1], 10, 90)], self.order)
        layout = Layout((ShardPlace(0, 10), ShardPlace(0, 90)), 0, 1)
        self.allocate = Allocate(Memory("gpt", 0, 1), Sizes(100, 0, 0), layout)

    def order(self, _: Allocate, wishes: tuple[Near, ...]) -> None:
        self.made.append(wishes)


def test_memory_is_ordered_once_all_who_write_are_known_or_after_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", {7: {0}, 8: {1}}.__getitem__)
    two = machine(tmp_path / "two", node0="0", node1="1")
    orders = Orders(two)
    orders.placer.take(orders.allocate)
    orders.pids[1] = 8
    orders.placer.look()
    assert orders.made == []
    orders.pids[0] = 7
    orders.placer.look()
    orders.placer.look()
    assert orders.made == [(Near(0, 10, 0), Near(10, 90, 1))]

    monkeypatch.setattr(numa, "KNOWN_AFTER_S_MAX", 0.0)
    orders.pids[0] = None  # it never comes
    orders.placer.take(orders.allocate)
    orders.placer.look()
    assert orders.made[1:] == [(Near(10, 90, 1),)]
    orders.placer.take(Allocate(Memory("gpt", 0, 2), Sizes(100, 0, 0)))  # no rank writes there
    assert orders.made[2:] == [()]
    alone = Orders(machine(tmp_path / "one", node0="0-1"))
    alone.placer.take(alone.allocate)
    assert alone.made == [()]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/self/numa_maps").exists(), reason="a kernel without memory nodes"
)
def test_the_kernel_takes_the_wish_for_the_bytes_of_a_shard_and_no_others() -> None:
    page = mmap.PAGESIZE
    descriptor = make_sealed("holdfast-numa", 64 * page)
    with mmap.mmap(descriptor, 64 * page) as mapping:
        prefer(mapping, [Near(10 * page + 1, 20 * page, 0), Near(0, 0, 0)])
        mapping[:] = b"x" * len(mapping)
        lines = [line for line in Path("/proc/self/numa_maps").read_text().splitlines() if "holdfast-numa" in line]
    os.close(descriptor)
    if not any("prefer" in line for line in lines):
        pytest.skip("this kernel, or who confines us, takes no such wish")
    policies = [(line.split()[1], int(re.findall(r"N0=(\d+)", line)[0])) for line in lines]
    assert policies == [("default", 11), ("prefer:0", 20), ("default", 33)]


def test_a_wish_that_can_not_be_fulfilled_harms_nothing() -> None:
    descriptor = make_sealed("holdfast-numa", mmap.PAGESIZE)
    with mmap.mmap(descriptor, mmap.PAGESIZE) as mapping:
        prefer(mapping, [Near(0, mmap.PAGESIZE, 1000)])  # there is no such node
        prefer(mapping, [Near(0, mmap.PAGESIZE, 5000)])  # nor can there be
        prefer(mapping, [Near(mmap.PAGESIZE, 99, 0)])  # beyond its end
        mapping[:4] = b"fine"
    os.close(descriptor)
