"""How one node sees another: told in heartbeats, so that a status can say who still has an old view of a node."""

from typing import Annotated

from holdfast.protocol.fields import Count, NodeNumber
from msgspec import Meta, Struct

ADDRESS_CHARS_MAX = 280  # a host's name has 253 at most
REFUSAL_CHARS_MAX = 200  # as much of the reason as is told on


class PeerView(Struct, frozen=True, array_like=True):
    """What the sender of a heartbeat believes of another node: of those of its group, and of the collector."""

    node: NodeNumber
    incarnation: Count  # the newest heard; 0: none
    alive: bool
    address: Annotated[str, Meta(max_length=ADDRESS_CHARS_MAX)]  # where the sender dials it
    refused: Annotated[str, Meta(max_length=REFUSAL_CHARS_MAX)] = ""  # why one refuses the other
