"""Whose view of a node is old: compared with what the node says of itself, and with what others have heard."""

from holdfast.daemon.core import events
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.node import Node
from holdfast.protocol import limits, messages
from holdfast.protocol.config import config_digest, parse_config
from holdfast.protocol.views import PeerView

TEXT = """
[cluster]
name = "four"
parity = 1
""" + "".join(f'[[node]]\nname = "n{n}"\naddress = "127.0.0.1:{n + 1}"\n' for n in range(4))
CONFIG = parse_config(TEXT, origin="test").config


class Collector:
    """Node 0, which hears three others."""

    def __init__(self) -> None:
        ctx = Context(
            config=CONFIG,
            config_digest=config_digest(CONFIG),
            placement=CONFIG.placement(),
            node=0,
            incarnation=1,
            worker_session=1,
            budget_bytes=1 << 30,
        )
        self.node = Node(ctx, started_ns=1)
        self.node.start()
        self.now_ns = 1

    def hears(self, node: int, *views: PeerView, incarnation: int = 1, address: str | None = None) -> None:
        beat = messages.Heartbeat(
            config_digest=config_digest(CONFIG), bulk_port=1, worker_session=1, arena_bytes=0, budget_bytes=0, jobs=(),
            address=f"127.0.0.1:{node + 1}" if address is None else address, views=views,
        )  # fmt: skip
        self.node.handle(events.PeerSaid(node, incarnation, beat), self.now_ns)

    def waits(self) -> None:
        self.now_ns += int(limits.VIEW_GRACE_S * 1e9)
        self.node.handle(events.TimePassed(1), self.now_ns)

    def old_views(self) -> dict[str, list[tuple[str, str]]]:
        rows = self.node.status()["nodes"]
        assert isinstance(rows, list)
        views = {row["name"]: [(old["node"], old["problem"]) for old in row["old_views"]] for row in rows}
        return {name: old for name, old in views.items() if old}


def view(node: int, incarnation: int, *, alive: bool = True, refused: str = "", at: int | None = None) -> PeerView:
    return PeerView(node, incarnation, alive, f"127.0.0.1:{node + 1 if at is None else at}", refused)


def test_nobody_s_view_is_old_where_all_have_heard_the_same() -> None:
    collector = Collector()
    collector.hears(1, view(0, 1), view(2, 1), view(3, 0, alive=False))  # nobody has heard node 3: it is not up
    collector.hears(2, view(0, 1), view(1, 1))
    collector.waits()
    assert collector.old_views() == {}


def test_who_has_just_begun_is_given_time_to_be_heard_and_to_tell_whom_it_heard() -> None:
    collector = Collector()
    collector.hears(1)
    collector.waits()
    collector.hears(1, view(2, 0, alive=False))
    collector.hears(2, view(1, 0, alive=False))
    assert collector.old_views() == {}
    collector.waits()
    told = [("n1", "has not heard it yet")], [("n2", "has not heard it yet")]
    assert collector.old_views() == {"n2": told[0], "n1": told[1]}


def test_who_dials_another_address_is_named_this_node_included() -> None:
    collector = Collector()
    collector.hears(1, view(2, 1))
    collector.hears(2, view(0, 1), view(1, 1), address="127.0.0.1:99")
    assert collector.old_views() == {
        "n2": [
            (
                name,
                f"dials 127.0.0.1:3, it is at 127.0.0.1:99; correct {name}'s config and give 'holdfast upgrade' there",
            )
            for name in ("n0", "n1")
        ]
    }
    collector.hears(1, view(2, 1, at=99))
    assert [name for name, _ in collector.old_views()["n2"]] == ["n0"]


def test_who_has_not_heard_the_newest_incarnation_or_refuses_it_is_named() -> None:
    collector = Collector()
    collector.hears(2, view(1, 1), incarnation=7)
    collector.hears(1, view(2, 5))
    collector.hears(3, view(2, 9, alive=False, refused="we refuse node n2: incarnation 7 is superseded by 9"))
    assert [name for name, _ in collector.old_views()["n2"]] == ["n3"], "the others may be about to tell that they have"
    collector.waits()
    assert collector.old_views() == {
        "n2": [
            ("n0", "has heard incarnation 7 only, 9 holds the slot"),
            ("n1", "has heard incarnation 5 only, 9 holds the slot"),
            ("n3", "we refuse node n2: incarnation 7 is superseded by 9"),
        ],
    }
    collector.hears(1, view(2, 0, alive=False))
    assert ("n1", "has not heard it yet") in collector.old_views()["n2"]


def test_a_refusal_of_the_machine_that_was_replaced_is_no_old_view() -> None:
    collector = Collector()
    collector.hears(2, incarnation=7)
    collector.hears(1, view(2, 7, refused="we refuse node n2: incarnation 5 is superseded by 7"))
    assert collector.old_views() == {}


def test_a_version_that_tells_no_address_has_no_old_one() -> None:
    collector = Collector()
    collector.hears(2, address="")
    assert collector.old_views() == {}


def test_heartbeats_tell_of_the_group_and_where_this_node_is() -> None:
    collector = Collector()
    collector.hears(2, incarnation=7)
    beat = collector.node.registry.heartbeat()
    assert beat.address == "127.0.0.1:1"
    assert [(one.node, one.incarnation, one.alive) for one in beat.views] == [
        (1, 0, False), (2, 7, True), (3, 0, False)
    ]  # fmt: skip
