"""The conversation of a trainer that can't map its daemon's memory with that daemon's gate, around the ordinary one.

Covers the header of every message: what the trainer sends (`TrainerMessage`) and what it gets (`GateMessage`). A header
may have a body, as one raw frame behind it: an ordinary message of `client_messages`, or bytes of the arena. What is
said in the ordinary conversation is no different from what a trainer on the node's own host says.
"""

from typing import Annotated

from holdfast.protocol import limits
from holdfast.protocol.fields import Count, JobName, Message, Text
from msgspec import Meta

Digest = Annotated[bytes, Meta(min_length=8, max_length=8)]  # xxh3 of the body, little-endian
PieceBytes = Annotated[int, Meta(ge=1, le=limits.REMOTE_PIECE_BYTES_MAX)]

# --- a trainer to the gate -------------------------------------------------------------------------------------------


class Arrive(Message, frozen=True):
    """The first message on a connection: please be my hands on the node. Answered by Handed with a Welcome."""


class Said(Message, frozen=True):
    """The body is a message to the daemon."""


class Put(Message, frozen=True):
    """The body belongs at `offset_bytes` of this memory. Answered by PutDone once it is there."""

    number: Count  # the trainer's own, for the answer
    job: JobName
    slot: Count
    generation: Count
    offset_bytes: Count
    digest: Digest


class Get(Message, frozen=True):
    """Please send these bytes of this memory. Answered by Got."""

    number: Count
    job: JobName
    slot: Count
    generation: Count
    offset_bytes: Count
    length_bytes: PieceBytes


TrainerMessage = Arrive | Said | Put | Get

# --- the gate to a trainer -------------------------------------------------------------------------------------------


class Handed(Message, frozen=True):
    """The body is what the daemon says on its Unix socket; where that has a descriptor beside it, the gate keeps it."""


class Told(Message, frozen=True):
    """The body is a message of the daemon."""


class PutDone(Message, frozen=True):
    """The bytes of that Put are in the node's memory, and have the digest that came with them."""

    number: Count


class Got(Message, frozen=True):
    """The body is what that Get asked for."""

    number: Count
    digest: Digest


class Beat(Message, frozen=True):
    """The gate is there; whoever can't be sent it has gone."""


class Gone(Message, frozen=True):
    """The gate ends this trainer's stay; the text says why. Nothing that it says from now on is heard."""

    text: Text


GateMessage = Handed | Told | PutDone | Got | Beat | Gone
