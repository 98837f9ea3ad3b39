"""Which epochs a worker serves, by what its keeper holds."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from holdfast.daemon.core.ledger import JobRecord, LedgerRecord, SlotRecord, encode_ledger
from holdfast.daemon.shell.keeping import KeeperLink, LedgerMemory
from holdfast.daemon.shell.taking_up import config_for, config_name, held_config, hold_config, places
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace

LAYOUT = Layout((ShardPlace(0, 64),), 0, 1)


def config(*names: str, epoch: int, cluster: str = "c", port: int = 7000) -> ClusterConfig:
    nodes = tuple(NodeConfig(name=n, host="127.0.0.1", port=port + i, domain=n) for i, n in enumerate(names))
    return ClusterConfig(cluster_name=cluster, nodes=nodes, parity=0, epoch=epoch)


def record(*, epoch: int, node: int, cluster: str = "c", phase: str = "committed", jobs: bool = True) -> LedgerRecord:
    snapshot = SnapshotId(1, 5) if phase == "committed" else None
    slot = SlotRecord(1, phase, snapshot, LAYOUT.layout_id)  # type: ignore[arg-type]  # one of its words
    job = JobRecord(
        "gpt", 1, None, (LAYOUT,), snapshot, LAYOUT.layout_id if snapshot else None, (), (slot,), closed=False
    )
    return LedgerRecord(cluster, epoch, node, 10, 3, (job,) if jobs else ())


@pytest.fixture
def link() -> Iterator[KeeperLink]:
    """A worker's end of a channel to a keeper that listens."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(b"start")
    made = KeeperLink(ours.detach(), [])
    yield made
    made.close()
    theirs.close()
    for descriptor in made.held.values():
        os.close(descriptor)


def hold(link: KeeperLink, held: LedgerRecord, name: str = "ledger") -> None:
    LedgerMemory(link, name).write(encode_ledger(held))


def test_what_is_held_of_this_epoch_is_taken_up_and_of_none_begins_anew(link: KeeperLink) -> None:
    now = config("a", "b", epoch=3)
    (first,) = places(link, now, "b")
    assert (first.node, first.record, first.ledger) == (1, None, "ledger")
    hold(link, record(epoch=3, node=1))
    (again,) = places(link, now, "b")
    assert again.record is not None


def test_a_higher_epoch_is_taken_up_beside_the_held_one(link: KeeperLink) -> None:
    old, now = config("a", "b", epoch=3), replace(config("x", "b", epoch=4, port=8000), slots=3)
    hold_config(link, old)
    hold(link, record(epoch=3, node=1))
    current, earlier = places(link, now, "b")
    assert (current.config, current.record, current.ledger) == (now, None, "ledger-4")
    assert (earlier.node, earlier.ledger, earlier.config.epoch) == (1, "ledger", 3)
    assert [node.port for node in earlier.config.nodes] == [7000, 8001], "as the new file knows them, if it does"
    assert earlier.config.slots == old.slots
    hold(link, record(epoch=4, node=1), "ledger-4")
    current, earlier = places(link, now, "b")
    assert current.record is not None, "amid the change another worker takes both up"
    assert earlier.record is not None


@pytest.mark.parametrize(
    ("held", "now"),
    [
        (record(epoch=5, node=1), config("a", "b", epoch=4)),
        (record(epoch=3, node=1, cluster="other"), config("a", "b", epoch=4)),
        (record(epoch=4, node=0), config("a", "b", epoch=4)),
        (record(epoch=2, node=1), config("a", "b", epoch=4)),  # its config is not held
    ],
    ids=["a higher epoch", "another cluster", "another index", "no config"],
)
def test_snapshots_are_never_given_up_by_a_config(link: KeeperLink, held: LedgerRecord, now: ClusterConfig) -> None:
    hold(link, held)
    with pytest.raises(OperatorError, match="would be given up") as refused:
        places(link, now, "b")
    assert refused.value.exit_code == ExitCode.WRONG_CLUSTER


def test_a_third_epoch_waits(link: KeeperLink) -> None:
    for epoch, name in ((3, "ledger"), (4, "ledger-4")):
        hold_config(link, config("a", "b", epoch=epoch))
        hold(link, record(epoch=epoch, node=1), name)
    with pytest.raises(OperatorError, match=r"epochs \[3, 4\] are held"):
        places(link, config("a", "b", epoch=5), "b")


def test_what_holds_no_snapshot_is_in_nobodys_way(link: KeeperLink) -> None:
    hold(link, record(epoch=9, node=0, cluster="other", phase="empty"))
    (only,) = places(link, config("a", "b", epoch=4), "b")
    assert (only.record, only.ledger) == (None, "ledger")


def test_a_node_that_leaves_goes_on_with_the_config_that_it_had(link: KeeperLink) -> None:
    old, now = config("a", "b", epoch=3), config("a", epoch=4)
    with pytest.raises(OperatorError, match="no node 'b'"):
        config_for(link, now, "b")
    hold_config(link, old)
    hold(link, record(epoch=3, node=1))
    assert config_for(link, now, "b") == old
    assert config_for(link, now, "a") == now


def test_a_held_config_that_was_damaged_counts_as_none(link: KeeperLink) -> None:
    hold_config(link, config("a", epoch=3))
    os.pwrite(link.held[config_name(3)], b"?", 20)
    assert held_config(link, 3) is None
