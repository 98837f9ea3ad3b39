"""Messages to frames and back; what is refused, and by which name.

Covers encoding, size limits, and the checks that every frame between daemons must pass: protocol version, cluster,
epoch, message type. Knows no socket. Any bytes either decode or raise FrameRefusedError with a code; nothing else
escapes.
"""

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec
from holdfast.protocol import limits, messages, remote_messages
from holdfast.protocol.fields import Count, NodeNumber, Text

T = TypeVar("T")


class BulkOffer(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the sender exchanges chunks, and the keys that seal them."""

    mode: Text = "digest"
    key: Annotated[bytes, msgspec.Meta(max_length=limits.BULK_KEY_BYTES)] = b""  # its public key
    heard: Annotated[bytes, msgspec.Meta(max_length=limits.BULK_KEY_BYTES)] = b""  # the receiver's, as it knows it


AS_THEY_ARE = BulkOffer()


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Around every message between daemons."""

    version: int
    cluster: Text
    epoch: Count
    node: NodeNumber
    incarnation: Count
    body: msgspec.Raw
    config: Text = ""  # digest of what must be equal on all nodes
    bulk: BulkOffer = AS_THEY_ARE


_peer_decoder: msgspec.msgpack.Decoder[messages.PeerMessage] = msgspec.msgpack.Decoder(messages.PeerMessage)
_client_decoder: msgspec.msgpack.Decoder[messages.ClientMessage] = msgspec.msgpack.Decoder(messages.ClientMessage)
_daemon_decoder: msgspec.msgpack.Decoder[messages.DaemonMessage] = msgspec.msgpack.Decoder(messages.DaemonMessage)
_door_decoder: msgspec.msgpack.Decoder[messages.DoorMessage] = msgspec.msgpack.Decoder(messages.DoorMessage)
_trainer_decoder: msgspec.msgpack.Decoder[remote_messages.TrainerMessage] = msgspec.msgpack.Decoder(
    remote_messages.TrainerMessage
)
_gate_decoder: msgspec.msgpack.Decoder[remote_messages.GateMessage] = msgspec.msgpack.Decoder(
    remote_messages.GateMessage
)
_header_decoder = msgspec.msgpack.Decoder(messages.ChunkHeader)
_refusal_decoder = msgspec.msgpack.Decoder(messages.Refused)
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)


class FrameRefusedError(Exception):
    """A frame was refused. `code` is one of `messages.Refused`'s; the text says what was expected and found."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


def encode(message: msgspec.Struct) -> bytes:
    """The frame of a message without envelope (client, daemon, door, chunk header)."""
    frame = msgspec.msgpack.encode(message)
    if len(frame) > limits.CONTROL_FRAME_BYTES_MAX:
        raise ValueError(
            f"{type(message).__name__} takes {len(frame)} bytes, the limit is {limits.CONTROL_FRAME_BYTES_MAX}"
        )
    return frame


def encode_peer(  # noqa: PLR0913  # the parts of an envelope
    message: messages.PeerMessage,
    *,
    cluster: str,
    epoch: int,
    node: int,
    incarnation: int,
    config: str = "",
    bulk: BulkOffer = AS_THEY_ARE,
) -> bytes:
    """The frame of a message between daemons, envelope included. `config` is the digest of the sender's config."""
    return encode(
        Envelope(
            version=limits.PROTOCOL_VERSION,
            cluster=cluster,
            epoch=epoch,
            node=node,
            incarnation=incarnation,
            body=msgspec.Raw(msgspec.msgpack.encode(message)),
            config=config,
            bulk=bulk,
        )
    )


def decode_peer(
    frame: bytes, *, cluster: str, epoch: int, config: str = "", bulk_mode: str = AS_THEY_ARE.mode
) -> tuple[Envelope, messages.PeerMessage]:
    """Check and open a frame from another daemon.

    Raises:
        FrameRefusedError: oversized, malformed, another protocol version, cluster, epoch, config digest or bulk mode,
            or an unknown message.
    """
    envelope = decode_envelope(frame)
    return envelope, check_peer(envelope, cluster=cluster, epoch=epoch, config=config, bulk_mode=bulk_mode)


def decode_envelope(frame: bytes) -> Envelope:
    """Open a frame from another daemon, with nothing checked but its form. Raises FrameRefusedError."""
    return _decode(_envelope_decoder, frame)


def check_peer(
    envelope: Envelope, *, cluster: str, epoch: int, config: str = "", bulk_mode: str = AS_THEY_ARE.mode
) -> messages.PeerMessage:
    """Check what an envelope says, and open what is in it. Raises what `decode_peer` raises."""
    if envelope.version != limits.PROTOCOL_VERSION:
        raise FrameRefusedError(
            "version",
            f"expected protocol version {limits.PROTOCOL_VERSION}, found {envelope.version}",
        )
    if envelope.cluster != cluster:
        raise FrameRefusedError("cluster", f"expected cluster {cluster!r}, found {envelope.cluster!r}")
    if envelope.epoch != epoch:
        raise FrameRefusedError("epoch", f"expected epoch {epoch}, found {envelope.epoch}")
    if envelope.config != config:
        raise FrameRefusedError(
            "config",
            f"expected config digest {config!r}, found {envelope.config!r}: the file of node {envelope.node} differs; "
            "compare them with 'holdfast config show'",
        )
    if envelope.bulk.mode != bulk_mode:
        raise FrameRefusedError(
            "bulk",
            f"expected bulk mode {bulk_mode!r}, found {envelope.bulk.mode!r} on node {envelope.node}; set "
            "security.bulk alike on all nodes, then give 'holdfast upgrade' on each",
        )
    return _decode(_peer_decoder, envelope.body)


def decode_client(frame: bytes) -> messages.ClientMessage:
    """Open a message of a trainer or command. Raises FrameRefusedError."""
    return _decode(_client_decoder, frame)


def decode_daemon(frame: bytes) -> messages.DaemonMessage:
    """Open a daemon's message to a trainer or command. Raises FrameRefusedError."""
    return _decode(_daemon_decoder, frame)


def decode_door(frame: bytes) -> messages.DoorMessage:
    """Open a frame of the Unix socket. Raises FrameRefusedError."""
    return _decode(_door_decoder, frame)


def decode_trainer(frame: bytes) -> remote_messages.TrainerMessage:
    """Open the header of a remote trainer's message. Raises FrameRefusedError."""
    if len(frame) > limits.REMOTE_HEADER_BYTES_MAX:
        text = f"a trainer's header of {len(frame)} bytes, the limit is {limits.REMOTE_HEADER_BYTES_MAX}"
        raise FrameRefusedError("oversized", text)
    return _decode(_trainer_decoder, frame)


def decode_gate(frame: bytes) -> remote_messages.GateMessage:
    """Open the header of a message to a remote trainer. Raises FrameRefusedError."""
    return _decode(_gate_decoder, frame)


def decode_header(frame: bytes, *, cluster: str, epoch: int) -> messages.ChunkHeader:
    """Check and open the header of a chunk. Raises FrameRefusedError."""
    if len(frame) > limits.BULK_HEADER_BYTES_MAX:
        raise FrameRefusedError(
            "oversized",
            f"a chunk header of {len(frame)} bytes, the limit is {limits.BULK_HEADER_BYTES_MAX}",
        )
    header = _decode(_header_decoder, frame)
    if header.cluster != cluster:
        raise FrameRefusedError("cluster", f"expected cluster {cluster!r}, found {header.cluster!r}")
    if header.epoch != epoch:
        raise FrameRefusedError("epoch", f"expected epoch {epoch}, found {header.epoch}")
    return header


def decode_refusal(frame: bytes) -> messages.Refused:
    """Open a refusal, the one message that comes without an envelope. Raises FrameRefusedError."""
    return _decode(_refusal_decoder, frame)


def pack_digests(digests: Sequence[int]) -> bytes:
    """Unsigned 64-bit digests, little-endian, one after the other."""
    return b"".join(digest.to_bytes(8, "little") for digest in digests)


def unpack_digests(packed: bytes) -> list[int]:
    """The inverse of `pack_digests`; a length that is not a multiple of 8 is refused."""
    if len(packed) % 8:
        raise FrameRefusedError("malformed", f"digests take 8 bytes each, found {len(packed)} bytes")
    return [int.from_bytes(packed[i : i + 8], "little") for i in range(0, len(packed), 8)]


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes | msgspec.Raw) -> T:
    size_bytes = len(memoryview(frame))
    if size_bytes > limits.CONTROL_FRAME_BYTES_MAX:
        raise FrameRefusedError(
            "oversized",
            f"a frame of {size_bytes} bytes, the limit is {limits.CONTROL_FRAME_BYTES_MAX}",
        )
    try:
        return decoder.decode(frame)
    except msgspec.ValidationError as error:
        # A tag that no message has. Nested records carry no tags, so the path is exactly this one.
        unknown = "Invalid value" in str(error) and str(error).endswith("`$.type`")
        code = "unknown" if unknown else "malformed"
        raise FrameRefusedError(code, str(error)) from error
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
        RecursionError,
        ValueError,
        OverflowError,
    ) as error:
        raise FrameRefusedError("malformed", str(error) or type(error).__name__) from error
