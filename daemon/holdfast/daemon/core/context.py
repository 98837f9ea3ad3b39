"""What every part of the core shares: who this node is, what time it is, and the list of actions being built.

Covers no decision. One `Context` per node; parts append actions to it and read the clock from it.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import Action, Log, ReplyClient, SendPeer
from holdfast.daemon.core.memory import GENERATION_BITS, Memory
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.earlier import EarlierGiven, EarlierReport, EarlierWanted
from holdfast.protocol.messages import DaemonMessage, PeerMessage
from holdfast.protocol.placement import Placement
from msgspec import UNSET, UnsetType


@dataclass(slots=True)
class Context:
    """Identity, clock and outbox of one node."""

    config: ClusterConfig
    config_digest: str
    placement: Placement
    node: int
    incarnation: int
    worker_session: int
    budget_bytes: int
    engine: str = ""
    bulk_port: int = 0
    now_ns: int = 0
    wall_ms_at_zero: int = 0  # the wall clock, in milliseconds, when `now_ns` would have been 0
    free_bytes: int = 0
    state_dir: str = ""  # where the shell writes recovery records
    recovery_record: str = ""  # the newest one
    dialled: set[int] = field(default_factory=set)
    down: set[int] = field(default_factory=set)  # heard once and silent now
    earlier: EarlierReport | UnsetType = UNSET  # what this worker still keeps of the epoch before; heartbeats tell it
    about_earlier: list[tuple[int, EarlierWanted | EarlierGiven]] = field(
        default_factory=list
    )  # said by nodes, not heard yet
    requests: int = 0  # questions asked so far; numbers them
    sums: int = 0  # sums asked for so far; numbers them
    stores: dict[int, Memory] = field(default_factory=dict)  # order's number -> where the shell may still write
    actions: list[Action] = field(default_factory=list)

    @property
    def wall_ms(self) -> int:
        """The wall clock in milliseconds; it only makes numbers that nobody else has used."""
        return self.wall_ms_at_zero + self.now_ns // 1_000_000

    def emit(self, action: Action) -> None:
        """Append one action."""
        self.actions.append(action)

    def log(self, text: str, level: str = "info") -> None:
        """Append a line for the operator."""
        assert level in {"info", "warning", "error"}
        self.actions.append(Log(level, text))  # type: ignore[arg-type]  # the assertion above narrows what mypy can't

    def reply(self, client: int, message: DaemonMessage) -> None:
        """Append an answer to a client."""
        self.actions.append(ReplyClient(client, message))

    def tell(self, node: int, message: PeerMessage) -> None:
        """Append a message to a node that is dialled; a message to anyone else is dropped."""
        if node in self.dialled and node != self.node:
            self.actions.append(SendPeer(node, message))

    def tell_all(self, message: PeerMessage) -> None:
        """Append a message to every dialled node: the group, the collector, and for a collector every node it hears."""
        for node in sorted(self.dialled):
            self.tell(node, message)

    def tell_group(self, message: PeerMessage) -> None:
        """Append a message to the other members of this node's group."""
        for node in self.group:
            self.tell(node, message)

    def new_request(self) -> int:
        """A number for the next question to another node, unlike all that a predecessor of this worker used."""
        self.requests += 1
        return (self.worker_session << 32) + self.requests

    def new_sum(self) -> int:
        """A number for the next sum that is wanted here, unlike those of earlier workers and holders of this slot."""
        self.sums += 1
        life = (self.incarnation * 1009 + self.worker_session) % (
            1 << 30
        )  # what they may still have under way is young
        return (life << 32) + self.sums

    def is_written(self, memory: Memory) -> bool:
        """Whether the shell may still write there, though who ordered it may have ended. Nobody else gets it then."""
        return memory in self.stores.values()

    @property
    def generations_from(self) -> int:
        """The generations of memory that this epoch makes begin above it: two epochs never give one name twice."""
        return (self.config.epoch - 1) << GENERATION_BITS

    @property
    def group(self) -> tuple[int, ...]:
        """The nodes of this node's group."""
        return self.placement.groups[self.placement.group_of(self.node)]

    def name_of(self, node: int) -> str:
        """A node's name, for people."""
        nodes = self.config.nodes  # a layout that a peer told may name others
        return nodes[node].name if 0 <= node < len(nodes) else f"node {node}, which is none of this cluster's"

    def seconds(self, seconds: float) -> int:
        """The clock `seconds` from now, in nanoseconds."""
        return self.now_ns + int(seconds * 1e9)
