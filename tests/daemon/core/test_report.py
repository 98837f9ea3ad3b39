"""What is said of a cluster that was not heard whole yet: feared, not claimed."""

import msgspec
import pytest
from holdfast.daemon.core import events
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.report import fitting
from holdfast.protocol import limits, messages
from holdfast.protocol.config import config_digest, parse_config
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace

TEXT = """
[cluster]
name = "four"
parity = 2
""" + "".join(f'[[node]]\nname = "n{n}"\naddress = "127.0.0.1:{n + 1}"\n' for n in range(4))
CONFIG = parse_config(TEXT, origin="test").config
LAYOUT = Layout(tuple(ShardPlace(node, 64) for node in range(4)), 0, 1)
COMMITTED = SnapshotId(1, 7)
START_NS = 1
JOINED_NS = int(limits.JOIN_S * 1e9) + START_NS


class Replacement:
    """Node 0, the collector, as a fresh replacement that hears the other three one by one."""

    def __init__(self) -> None:
        ctx = Context(
            config=CONFIG,
            config_digest=config_digest(CONFIG),
            placement=CONFIG.placement(),
            node=0,
            incarnation=2,
            worker_session=1,
            budget_bytes=1 << 30,
            free_bytes=1 << 30,
        )
        self.node = Node(ctx, started_ns=START_NS)
        self.node.start()

    def hears(self, node: int, *, now_ns: int = START_NS) -> None:
        report = messages.JobReport(
            job="gpt",
            attempt=1,
            layout_id=None,
            layout_version=0,
            committed=COMMITTED,
            committed_layout_id=LAYOUT.layout_id,
            held=(COMMITTED,),
            open=(),
        )
        beat = messages.Heartbeat(
            config_digest=config_digest(CONFIG), bulk_port=1, worker_session=1, arena_bytes=0, budget_bytes=0,
            jobs=(report,),
        )  # fmt: skip
        self.node.handle(events.PeerSaid(node, 1, beat), now_ns)

    def learns_the_layout(self, now_ns: int = START_NS) -> None:
        announced = messages.LayoutAnnounced("gpt", 1, LAYOUT, current=False)
        self.node.handle(events.PeerSaid(1, 1, announced), now_ns)
        self.hears(1, now_ns=now_ns)

    def waits(self) -> None:
        self.node.handle(events.TimePassed(1 << 30), JOINED_NS)


def test_who_was_not_heard_yet_is_not_called_lost() -> None:
    replacement = Replacement()
    replacement.hears(1)
    replacement.learns_the_layout()
    status = replacement.node.status()
    assert (status["complete"], status["unheard"]) == (False, ["n2", "n3"])
    assert (status["verdict"], status["more_losses"]) == ("UNPROTECTED", 0)
    assert "n2 (not heard yet)" in str(status["reason"])
    replacement.waits()
    replacement.hears(1, now_ns=JOINED_NS)
    status = replacement.node.status()
    assert (status["complete"], status["verdict"]) == (True, "LOST"), "they had their time"


def test_a_message_is_not_yet_word_of_what_a_node_holds() -> None:
    replacement = Replacement()
    for node in (1, 2):
        replacement.hears(node)
    replacement.learns_the_layout()
    replacement.node.handle(events.PeerSaid(3, 1, messages.RebuildAsked(0)), START_NS)
    assert not replacement.node.peers.settled, "node 3 is alive, and may hold what is needed"
    assert replacement.node.status()["unheard"] == ["n3"]
    replacement.hears(3)
    assert replacement.node.peers.settled
    status = replacement.node.status()
    assert (status["complete"], status["verdict"], status["more_losses"]) == (True, "DEGRADED", 1)


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_is_whole_whose_layout_is_not_known(learned: bool) -> None:
    replacement = Replacement()
    for node in (1, 2, 3):
        replacement.hears(node)
    if learned:
        replacement.learns_the_layout()
    rows = replacement.node.status()["nodes"]
    assert isinstance(rows, list)
    held = rows[0]["jobs"]["gpt"]
    assert (held["committed_step"], held["whole"]) == (7, False)
    assert (held["lost_bytes"] > 0) is learned
    assert rows[1]["jobs"]["gpt"]["whole"]


def test_a_status_that_does_not_fit_a_frame_leaves_out_nodes_that_are_well(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "index": index,
            "name": f"n{index}",
            "state": "down" if index == 70 else "up",
            "jobs": {"a": {"whole": index != 50}},
        }
        for index in range(100)
    ]
    status = {"verdict": "DEGRADED", "nodes": rows}
    assert fitting(status) is status
    monkeypatch.setattr(limits, "STATUS_BYTES_MAX", 2000)
    told = fitting(status)
    assert len(msgspec.msgpack.encode(told)) <= 2000
    assert told["nodes_left_out"] + len(told["nodes"]) == 100
    shown = [row["index"] for row in told["nodes"]]
    assert {50, 70} <= set(shown)
    assert shown == sorted(shown)
