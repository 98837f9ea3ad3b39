"""A slot that was given up under a rank's hands is not given to another snapshot until that rank is done with it."""

from holdfast.daemon.core import actions, events
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.node import Node
from holdfast.protocol import limits, messages
from holdfast.protocol.config import config_digest, parse_config
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace

TEXT = """
[cluster]
name = "alone"
parity = 0
[[node]]
name = "n0"
address = "127.0.0.1:1"
"""
LAYOUT = Layout((ShardPlace(0, 64), ShardPlace(0, 64)), 0, 1)
FREE_BYTES = 1 << 30


class Alone:
    """One node with two ranks, clients 1 and 2, that have planned; memory is there as soon as it is ordered."""

    def __init__(self) -> None:
        config = parse_config(TEXT, origin="test").config
        ctx = Context(
            config=config,
            config_digest=config_digest(config),
            placement=config.placement(),
            node=0,
            incarnation=1,
            worker_session=1,
            budget_bytes=FREE_BYTES,
            free_bytes=FREE_BYTES,
        )
        self.node, self.now_ns = Node(ctx, started_ns=1), 1
        self.granted: list[tuple[int, int]] = []  # (step, slot)
        self.said: list[messages.DaemonMessage] = []  # to any client
        self.slow: list[actions.Allocate] | None = None  # what the kernel is still making, if it takes its time
        self.node.start()
        for client in (1, 2):
            self.happens(events.ClientArrived(client, client))
        self.says(1, messages.AskRestore("gpt"))
        self.happens(events.TimePassed(FREE_BYTES))
        for client in (1, 2):
            self.says(client, messages.Plan("gpt", 1, client - 1, LAYOUT))

    def happens(self, event: events.Event) -> None:
        self.now_ns += 1_000_000
        for action in self.node.handle(event, self.now_ns):
            if isinstance(action, actions.Allocate):
                if self.slow is not None:
                    self.slow.append(action)
                else:
                    self.happens(events.MemoryReady(action.memory))
            if isinstance(action, actions.ReplyClient):
                self.said.append(action.message)
            if isinstance(action, actions.ReplyClient) and isinstance(action.message, messages.Granted):
                self.granted.append((action.message.snapshot.step, action.message.slot))
        self.node.check()

    def says(self, client: int, message: messages.ClientMessage) -> None:
        self.happens(events.ClientSaid(client, message))

    def begin(self, client: int, step: int) -> None:
        self.says(client, messages.Begin("gpt", SnapshotId(1, step), client - 1))

    def skip(self, client: int, step: int) -> None:
        self.says(client, messages.Skip("gpt", SnapshotId(1, step), client - 1, "test"))


def given_up_while_client_2_writes() -> Alone:
    alone = Alone()
    alone.begin(1, 0)
    alone.begin(2, 0)
    alone.skip(1, 0)
    assert alone.granted == [(0, 0), (0, 0)]
    alone.begin(1, 1)
    alone.skip(1, 1)
    alone.begin(1, 2)
    return alone


def test_a_slot_in_a_ranks_hands_is_not_used_again() -> None:
    alone = given_up_while_client_2_writes()
    assert alone.granted[2:] == [(1, 1), (2, 1)]


def test_it_is_used_again_when_the_rank_went_on() -> None:
    alone = given_up_while_client_2_writes()
    alone.begin(2, 2)
    alone.skip(1, 2)
    alone.begin(1, 3)
    assert alone.granted[4:] == [(2, 1), (3, 0)]


def test_it_is_used_again_when_the_rank_is_gone() -> None:
    alone = given_up_while_client_2_writes()
    alone.happens(events.ClientGone(2))
    alone.happens(events.ClientArrived(3, 3))
    alone.says(3, messages.Plan("gpt", 1, 1, LAYOUT))
    alone.skip(1, 2)
    alone.begin(1, 3)
    assert alone.granted[4:] == [(3, 0)]


def test_a_rank_that_has_no_place_in_a_layout_planned_while_it_waited_for_memory_is_told() -> None:
    alone = Alone()
    for client in (1, 2):
        alone.happens(events.ClientGone(client))
    alone.slow = []
    for client, role, shards, version in ((3, 2, 3, 8), (4, 0, 1, 9)):
        alone.happens(events.ClientArrived(client, client))
        layout = Layout(tuple(ShardPlace(0, 5000 + version) for _ in range(shards)), 0, 1, version)
        alone.says(client, messages.Plan("gpt", 1, role, layout))
    alone.said.clear()
    making = alone.slow
    alone.slow = None
    for order in making:
        alone.happens(events.MemoryReady(order.memory))
    denied, accepted = [said for said in alone.said if isinstance(said, messages.Denied | messages.PlanAccepted)]
    assert "role 2 is not on this node in the layout that another rank planned" in getattr(denied, "text", "")
    assert isinstance(accepted, messages.PlanAccepted)


def test_a_plan_that_can_never_fit_is_refused_with_the_numbers_and_costs_no_closed_job() -> None:
    alone = Alone()
    for client in (1, 2):
        alone.says(client, messages.Leave("gpt", client - 1))
    assert alone.node.jobs["gpt"].job.closed
    alone.happens(events.ClientArrived(3, 3))
    alone.says(3, messages.AskRestore("huge"))
    alone.happens(events.TimePassed(FREE_BYTES))
    alone.said.clear()
    attempt = alone.node.jobs["huge"].job.attempt
    alone.says(3, messages.Plan("huge", attempt, 0, Layout((ShardPlace(0, 1 << 41),), 0, 1)))
    (denied,) = [said for said in alone.said if isinstance(said, messages.Denied)]
    assert "memory budget: needed 2199" in denied.text
    assert "gpt" in alone.node.jobs, "nobody's going would have been enough"


def test_a_plan_of_more_chunks_than_a_group_may_have_is_refused_with_the_numbers() -> None:
    alone = Alone()
    alone.happens(events.ClientArrived(3, 3))
    alone.says(3, messages.AskRestore("huge"))
    alone.happens(events.TimePassed(FREE_BYTES))
    alone.said.clear()
    attempt = alone.node.jobs["huge"].job.attempt
    alone.says(3, messages.Plan("huge", attempt, 0, Layout((ShardPlace(0, 1 << 60),), 0, 1)))
    (denied,) = [said for said in alone.said if isinstance(said, messages.Denied)]
    assert f"1099511627776 chunks, {limits.GROUP_CHUNKS_MAX} are the limit" in denied.text


def test_a_node_beyond_the_cluster_has_words_for_people() -> None:
    assert "none of this cluster's" in Alone().node.ctx.name_of(4095)


def test_who_writes_which_bytes_is_known_as_soon_as_ranks_have_planned() -> None:
    alone = Alone()
    job = alone.node.jobs["gpt"].job
    assert job.writers_of(LAYOUT) == [(1, 0, 64), (2, 64, 64)]
    wider = Layout((ShardPlace(0, 10), ShardPlace(1, 99), ShardPlace(0, 20), ShardPlace(0, 30)), 0, 1)
    assert job.writers_of(wider) == [(1, 0, 10), (None, 10, 20), (None, 30, 30)]
