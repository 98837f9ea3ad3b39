"""Reading what is committed through any node's daemon: bytes as they were staged, also those of a node that is gone."""

from collections.abc import Callable, Iterator

import pytest
import torch
from holdfast.client import DaemonUnreachableError, NotRecoverableError, Snapshotter, SupersededError
from holdfast.client.ranges import RangeReader
from holdfast.client.restore import restore_into
from local_cluster import DEADLINE_S, LocalCluster, until

SIZE = 300_000  # int64 elements: 2.4 MB, 37 chunks of 64 KiB


@pytest.fixture(scope="module")
def committed() -> Iterator[tuple[LocalCluster, Snapshotter, torch.Tensor]]:
    """Three nodes with parity 1, and a job whose one rank, on node 0, has committed step 0."""
    with LocalCluster(nodes=3) as cluster:
        cluster.start()
        state = torch.arange(SIZE)
        snapshotter = Snapshotter({"state": state}, job="read", socket=cluster.socket(0), on_error="raise")
        snapshotter.restore()
        snapshotter.step(0)
        snapshotter.wait(timeout_s=DEADLINE_S)
        yield cluster, snapshotter, state


def whole_shard(reader: RangeReader) -> memoryview:
    shard = bytearray(reader.layout.shards[0].shard_bytes)
    reader.read_into(0, 0, shard)
    return memoryview(shard)


def test_a_shard_read_elsewhere_is_the_shard(committed: tuple[LocalCluster, Snapshotter, torch.Tensor]) -> None:
    cluster, _, state = committed
    with RangeReader(job="read", socket=cluster.socket(2)) as reader:
        found = reader.committed()
        assert found is not None
        assert found.snapshot.step == 0
        restored = torch.zeros_like(state)
        shard = whole_shard(reader)
        restore_into({"state": restored}, shard)
        assert torch.equal(restored, state)
        for start, length in ((0, 1), (65_535, 2), (1_000_000, 300_000), (len(shard) - 1, 1)):
            with reader.read(0, start, length) as view:
                assert view.readonly
                assert view == shard[start : start + length]


def test_what_is_asked_wrongly_is_refused_with_a_reason(
    committed: tuple[LocalCluster, Snapshotter, torch.Tensor],
) -> None:
    cluster, _, _ = committed
    with RangeReader(job="nobody", socket=cluster.socket(1), timeout_s=20) as reader:
        assert reader.committed() is None
        with pytest.raises(ValueError, match="call committed"), reader.read(0, 0, 1):
            pass
    with pytest.raises(DaemonUnreachableError):
        RangeReader(job="read", socket=cluster.folder / "nobody")


def test_bytes_of_a_missing_node_are_computed_and_a_released_snapshot_is_named(
    committed: tuple[LocalCluster, Snapshotter, torch.Tensor],
) -> None:
    cluster, snapshotter, state = committed
    with RangeReader(job="read", socket=cluster.socket(1)) as reader:
        reader.committed()
        shard = whole_shard(reader)
        snapshotter.before_update()
        snapshotter.step(1)
        snapshotter.wait(timeout_s=DEADLINE_S)
        with pytest.raises(SupersededError) as caught, reader.read(0, 0, 1):
            pass
        assert caught.value.newest.step == 1
        snapshotter.close()
        cluster.kill(0)
        found = reader.committed()
        assert found is not None
        assert found.snapshot.step == 1
        assert whole_shard(reader)[-state.nbytes :] == shard[-state.nbytes :]
        cluster.kill(2)
        assert "n0" in until(lambda: refused(lambda: whole_shard(reader)), "a refusal")


def refused(read: Callable[[], memoryview]) -> str | None:
    try:
        read()
    except NotRecoverableError as error:
        return str(error)
    return None
