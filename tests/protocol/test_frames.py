"""Frames: what is said comes back as said; any other bytes are refused by name."""

from collections.abc import Callable
from typing import TypedDict

import msgspec
import pytest
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.frames import FrameRefusedError
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace
from hypothesis import given, settings
from hypothesis import strategies as st


class Identity(TypedDict):
    """What all nodes of a cluster have in common."""

    cluster: str
    epoch: int
    config: str


IDENTITY: Identity = {"cluster": "lab", "epoch": 3, "config": "0123456789abcdef"}
CODES = {"malformed", "oversized", "unknown", "version", "cluster", "epoch", "config", "bulk"}
SNAPSHOT = SnapshotId(2, 41)
LAYOUT = Layout((ShardPlace(0, 64), ShardPlace(1, 128)), 0, 5, 2)


class Unheard(messages.Message, frozen=True):
    """A message that no peer knows."""

    number: int


def peer_frame(message: object, **changes: object) -> bytes:
    known = {**IDENTITY, "node": 1, "incarnation": 7, **changes}
    return frames.encode_peer(message, **known)  # type: ignore[arg-type]  # one case below is no peer message on purpose


def refusal_of(decode: Callable[[], object]) -> str | None:
    """The code by which a frame was refused, None if it was taken."""
    try:
        decode()
    except FrameRefusedError as refusal:
        return refusal.code
    return None


@pytest.mark.parametrize(
    "message",
    [
        messages.NodeProtected("gpt", SNAPSHOT, 1),
        messages.LayoutAnnounced("gpt", 2, LAYOUT, current=True),
        messages.DigestsAnnounced("gpt", SNAPSHOT, 1, 0, frames.pack_digests([0, 1 << 63])),
        messages.RestoreDecided("gpt", 1, 2, SNAPSHOT, LAYOUT),
        messages.ReadChunk("gpt", SNAPSHOT, "parity", 3),
        messages.StatusGiven(1, {"a": [1, {"b": None}]}),
    ],
)
def test_a_peer_s_message_comes_back_as_said(message: messages.PeerMessage) -> None:
    envelope, found = frames.decode_peer(peer_frame(message), **IDENTITY)
    assert found == message
    assert (envelope.node, envelope.incarnation) == (1, 7)


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"cluster": "other"}, "cluster", "expected cluster 'lab', found 'other'"),
        ({"epoch": 2}, "epoch", "expected epoch 3, found 2"),
        ({"config": "f" * 16}, "config", None),
        ({"bulk": frames.BulkOffer("sealed", b"k" * 32)}, "bulk", None),
    ],
)
def test_another_cluster_or_epoch_is_refused_by_name(changes: dict[str, object], code: str, text: str | None) -> None:
    with pytest.raises(FrameRefusedError) as refusal:
        frames.decode_peer(peer_frame(messages.ReportWanted(1), **changes), **IDENTITY)
    assert refusal.value.code == code
    assert text is None or refusal.value.text == text


def test_peers_of_different_bulk_modes_hear_each_others_and_what_to_do() -> None:
    sealed = frames.BulkOffer("sealed", b"k" * 32, b"h" * 32)
    envelope, _ = frames.decode_peer(peer_frame(messages.ReportWanted(1), bulk=sealed), **IDENTITY, bulk_mode="sealed")
    assert envelope.bulk == sealed
    with pytest.raises(FrameRefusedError) as refusal:
        frames.decode_peer(peer_frame(messages.ReportWanted(1)), **IDENTITY, bulk_mode="sealed")
    assert refusal.value.code == "bulk"
    assert "expected bulk mode 'sealed', found 'digest' on node 1; set security.bulk alike" in refusal.value.text


def test_where_chunks_are_not_sealed_messages_say_no_word_of_it() -> None:
    """So those of a daemon that knows no modes and of one that does are the same."""
    assert "bulk" not in msgspec.msgpack.decode(peer_frame(messages.ReportWanted(1)))


def test_an_unknown_message_is_refused_as_unknown() -> None:
    with pytest.raises(FrameRefusedError) as refusal:
        frames.decode_peer(peer_frame(Unheard(1)), **IDENTITY)
    assert refusal.value.code == "unknown"
    assert "Unheard" in refusal.value.text


def test_values_out_of_bounds_are_refused() -> None:
    for raw in (
        {"type": "NodeProtected", "job": "no spaces", "snapshot": [1, 2], "node": 0},
        {"type": "NodeProtected", "job": "gpt", "snapshot": [1, 2], "node": limits.NODE_COUNT_MAX},
        {"type": "NodeProtected", "job": "gpt", "snapshot": [1], "node": 0},
        {"type": "NodeProtected", "job": "gpt", "node": 0},
    ):
        body = msgspec.Raw(msgspec.msgpack.encode(raw))
        around = frames.Envelope(limits.PROTOCOL_VERSION, "lab", 3, 1, 7, body, IDENTITY["config"])
        with pytest.raises(FrameRefusedError, match="malformed"):
            frames.decode_peer(msgspec.msgpack.encode(around), **IDENTITY)


def test_what_a_later_version_says_beyond_is_ignored_and_what_an_earlier_one_leaves_out_has_a_default() -> None:
    """A worker is replaced while its trainers and the other nodes go on with the code they have."""
    begin = {"type": "Begin", "job": "gpt", "snapshot": [1, 2], "role": 0}
    for raw in (begin, begin | {"stall_ns": 5, "extra": [1]}):
        told = frames.decode_client(msgspec.msgpack.encode(raw))
        assert told == messages.Begin("gpt", SnapshotId(1, 2), 0, raw.get("stall_ns"))
    body = msgspec.Raw(msgspec.msgpack.encode({"type": "ReportWanted", "request": 1, "extra": {"deep": 1}}))
    around = frames.Envelope(limits.PROTOCOL_VERSION, "lab", 3, 1, 7, body, IDENTITY["config"])
    assert frames.decode_peer(msgspec.msgpack.encode(around), **IDENTITY)[1] == messages.ReportWanted(1)
    progress = {
        "type": "Progress",
        "job": "gpt",
        "sealed": None,
        "protected": None,
        "committed": None,
        "given_up": None,
    }
    assert frames.decode_daemon(msgspec.msgpack.encode(progress | {"extra": 1})) == messages.Progress(
        "gpt", None, None, None, None
    )


def test_an_oversized_frame_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(FrameRefusedError, match="oversized"):
        frames.decode_client(bytes(limits.CONTROL_FRAME_BYTES_MAX + 1))


@settings(max_examples=400)
@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused_by_a_known_name(raw: bytes) -> None:
    for decode in (
        lambda: frames.decode_peer(raw, **IDENTITY),
        lambda: frames.decode_client(raw),
        lambda: frames.decode_daemon(raw),
        lambda: frames.decode_door(raw),
        lambda: frames.decode_refusal(raw),
        lambda: frames.decode_header(raw, cluster="lab", epoch=3),
    ):
        assert refusal_of(decode) in {None, *CODES}


@settings(max_examples=200)
@given(st.data())
def test_a_bent_frame_decodes_or_is_refused(data: st.DataObject) -> None:
    frame = bytearray(peer_frame(messages.LayoutAnnounced("gpt", 2, LAYOUT, current=True)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    assert refusal_of(lambda: frames.decode_peer(cut, **IDENTITY)) in {None, *CODES}


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=50))
def test_digests_come_back(digests: list[int]) -> None:
    assert frames.unpack_digests(frames.pack_digests(digests)) == digests


def test_half_a_digest_is_refused() -> None:
    with pytest.raises(FrameRefusedError, match="found 9 bytes"):
        frames.unpack_digests(bytes(9))
