"""The network between simulated nodes: connections that keep order, lose what is in flight when cut, and may be slow.

Control frames are dropped where nothing is connected, as the shell's sockets do. Chunks wait for a connection, and
their bytes are read when they are sent, not when the core decided to send them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sim.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFaults:
    """Probabilities per message, and delays in seconds."""

    delay_s: float = 0.0005
    delay_s_max: float = 0.01
    lost: float = 0.0  # a control frame that finds its queue full
    doubled: float = 0.0
    corrupted: float = 0.0  # a chunk whose bytes change on the way


@dataclass(slots=True)
class Connection:
    """One direction between two nodes on one plane."""

    cut: int = 0  # raised by every cut: what was sent before is lost
    last_ns: int = 0  # arrival of the frame sent last: order is kept
    slow_until_ns: int = 0


@dataclass(slots=True)
class Network:
    """All connections of a cluster."""

    world: World
    faults: NetworkFaults
    is_up: Callable[[int], bool]
    calm: bool = False  # faults have stopped
    blocked: set[tuple[int, int]] = field(default_factory=set)  # (from, to): partitioned
    connections: dict[tuple[int, int, str], Connection] = field(default_factory=dict)

    def connection(self, sender: int, receiver: int, plane: str) -> Connection:
        """The connection of one direction and plane."""
        return self.connections.setdefault((sender, receiver, plane), Connection())

    def open(self, sender: int, receiver: int) -> bool:
        """Whether a frame could be sent now."""
        return (sender, receiver) not in self.blocked and self.is_up(sender) and self.is_up(receiver)

    def send(self, sender: int, receiver: int, plane: str, deliver: Callable[[], None]) -> None:
        """Carry one frame; `deliver` is called when it arrives, perhaps never, rarely twice."""
        faults, world = self.faults, self.world
        if not self.open(sender, receiver):
            return
        if not self.calm and plane == "control" and world.chance(faults.lost):
            world.note(f"lost {sender}->{receiver}")
            return
        connection = self.connection(sender, receiver, plane)
        cut = connection.cut
        delay_s = world.between(faults.delay_s, faults.delay_s_max)
        if world.now_ns < connection.slow_until_ns:
            delay_s += world.between(0.2, 3.0)
        connection.last_ns = max(connection.last_ns + 1, world.now_ns + int(delay_s * 1e9))

        def arrive() -> None:
            if connection.cut == cut and self.is_up(receiver):
                deliver()

        world.at(connection.last_ns, arrive)
        if not self.calm and world.chance(faults.doubled):
            world.at(connection.last_ns + int(world.between(0, 2.0) * 1e9), arrive)

    def cut(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Break connections; they come back by themselves, what was under way is lost."""
        for sender, receiver in pairs:
            for plane in ("control", "bulk"):
                self.connection(sender, receiver, plane).cut += 1

    def cut_node(self, node: int) -> None:
        """Break every connection of a node."""
        self.cut([key[:2] for key in self.connections if node in key[:2]])

    def slow(self, sender: int, receiver: int, seconds: float) -> None:
        """Have what is sent in one direction arrive late for a while."""
        for plane in ("control", "bulk"):
            self.connection(sender, receiver, plane).slow_until_ns = self.world.now_ns + int(seconds * 1e9)
