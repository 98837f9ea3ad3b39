"""Bits that flip in the memory of real daemons are found by their own reading, and brought back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.client import Snapshotter
from holdfast.coding import chunk_digest
from local_cluster import LocalCluster, job_row

MakeCluster = Callable[..., LocalCluster]
SIZE = 300_000  # int64 elements: 2.4 MB, 37 chunks of 64 KiB
CHUNK_BYTES = 64 << 10
PERIOD_S = 2


def commit_once(cluster: LocalCluster) -> None:
    """A job that commits one step on node 0 and ends; its snapshot rests from then on."""
    with Snapshotter({"state": torch.arange(SIZE)}, job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.step(0)
        job.wait(timeout_s=20)


def memories(cluster: LocalCluster, node: int, part: str) -> list[Path]:
    """The worker's held memory of one kind, each once: a mapping keeps a descriptor of its own."""
    found = {}
    for entry in Path(f"/proc/{cluster.worker(node)}/fd").iterdir():
        if entry.is_symlink() and str(entry.readlink()).startswith(f"/memfd:holdfast-{part}"):
            found[entry.stat().st_ino] = entry
    return list(found.values())


def contents(cluster: LocalCluster) -> list[bytes]:
    """Everything that rests in a cluster, in an order that stays while no memory is made or freed."""
    return [
        path.read_bytes()
        for node in range(len(cluster.names))
        for part in ("data", "guard")
        for path in sorted(memories(cluster, node, part), key=lambda path: path.stat().st_ino)
    ]


def flip(path: Path, offset: int) -> None:
    """One bit, as a bad memory cell would."""
    with path.open("r+b", buffering=0) as memory:
        memory.seek(offset)
        found = memory.read(1)
        memory.seek(offset)
        memory.write(bytes([found[0] ^ 0x40]))


def total(status: dict[str, Any], key: str) -> int:
    return int(job_row(status, "job").get(key, 0))


@pytest.fixture
def resting(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    monkeypatch.setenv("HOLDFAST_SCRUB_PERIOD_S", str(PERIOD_S))
    cluster = make_cluster(nodes=3, parity=2)
    cluster.start()
    commit_once(cluster)
    cluster.wait_status(lambda s: total(s, "scrub_passes") > 0, "a whole pass over what rests")
    return cluster


def test_flips_in_data_and_parity_are_repaired_bit_by_bit(resting: LocalCluster) -> None:
    before = contents(resting)
    where = [(0, "data", 1), (1, "guard", 3), (2, "guard", 5)]  # of different stripes: each has one data chunk
    for node, part, chunk in where:
        for path in memories(resting, node, part):  # two slots, of which one holds the snapshot
            flip(path, chunk * CHUNK_BYTES + 4_000)
    resting.wait_status(lambda s: total(s, "repaired_chunks") >= 3, "three repairs")
    resting.wait_status(lambda s: total(s, "damaged_chunks") == 0, "no damage left")
    row = job_row(resting.status(), "job")
    assert row["digest_failures"] == 3
    assert row["verdict"] == "HEALTHY"
    # The slots that hold nothing keep their flips: nobody will ever read them before they are written again.
    after = contents(resting)
    assert sum(old != new for old, new in zip(before, after, strict=True)) <= 3
    assert "is repaired from its stripe" in resting.log(0)


def test_parity_that_was_always_wrong_is_found_by_its_fingerprint(resting: LocalCluster) -> None:
    changed = 0
    for path in memories(resting, 1, "guard"):
        guard = path.read_bytes()
        parity_count = len(guard) // CHUNK_BYTES
        data_count = (len(guard) - parity_count * CHUNK_BYTES) // 8 - parity_count
        place = parity_count * CHUNK_BYTES + 8 * data_count  # where the digest of parity chunk 0 stands
        if guard[place : place + 8] == chunk_digest(guard[:CHUNK_BYTES]).to_bytes(8, "little"):
            flip(path, 100)
            digest = chunk_digest(path.read_bytes()[:CHUNK_BYTES]).to_bytes(8, "little")
            with path.open("r+b", buffering=0) as memory:
                memory.seek(place)
                memory.write(digest)
            changed += 1
    assert changed
    resting.kill_worker(1)  # its successor believes the table that it finds
    resting.wait_log(1, "takes up")
    resting.wait_status(lambda s: total(s, "disagreeing_stripes") > 0, "the disagreement is seen", node=1)
    resting.wait_status(lambda s: total(s, "repaired_chunks") > 0, "the parity is encoded anew", node=1)
