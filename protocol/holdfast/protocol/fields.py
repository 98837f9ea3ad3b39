"""What the fields of messages may hold, and the record that every message is."""

from typing import Annotated

from holdfast.protocol import limits
from holdfast.protocol.ids import JOB_NAME
from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0, le=limits.STEP_MAX)]
Every = Annotated[int, Meta(ge=1, le=limits.STEP_MAX)]  # steps between two snapshots
Seconds = Annotated[float, Meta(ge=0, le=limits.TIME_S_MAX)]
NodeNumber = Annotated[int, Meta(ge=0, lt=limits.NODE_COUNT_MAX)]
RoleNumber = Annotated[int, Meta(ge=0, lt=limits.WORLD_SIZE_MAX)]
JobName = Annotated[str, Meta(pattern=f"^{JOB_NAME.pattern}$", max_length=64)]
Text = Annotated[str, Meta(max_length=limits.TEXT_CHARS_MAX)]
PackedDigests = Annotated[bytes, Meta(max_length=limits.DIGESTS_PER_MESSAGE_MAX * 8)]


class Message(Struct, frozen=True, tag=True):
    """A record with its class name as tag. Unknown tags are refused, and values out of bounds.

    Unknown fields are ignored: a later version of the same protocol may say more. Whatever an older one could misread
    without them raises the protocol's version.
    """
