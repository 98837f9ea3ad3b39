"""Every message that exists, with any content that its types allow, survives its frame; what they forbid does not."""

import math
import typing
from types import UnionType
from typing import Any

import msgspec
import pytest
from holdfast.protocol import frames, limits, messages, remote_messages
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from hypothesis import given, settings
from hypothesis import strategies as st

PEER_TYPES = typing.get_args(messages.PeerMessage)
CLIENT_TYPES = typing.get_args(messages.ClientMessage)
DAEMON_TYPES = typing.get_args(messages.DaemonMessage)
TRAINER_TYPES = typing.get_args(remote_messages.TrainerMessage)
GATE_TYPES = typing.get_args(remote_messages.GateMessage)
DOOR_TYPES = typing.get_args(messages.DoorMessage)
IDENTITY: dict[str, Any] = {"cluster": "lab", "epoch": 3, "config": "0123456789abcdef"}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values that an annotation allows, its `Meta` included."""
    metas = [meta for meta in getattr(kind, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    meta = metas[0] if metas else msgspec.Meta()
    kind = getattr(kind, "__origin__", kind) if metas else kind
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {typing.Union, UnionType}:
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and Ellipsis not in arguments:
        return st.tuples(*(values_of(argument) for argument in arguments))
    if origin is tuple:
        lengths = {"min_size": meta.min_length or 0, "max_size": min(3, meta.max_length or 3)}
        return st.lists(values_of(arguments[0]), **lengths).map(tuple)
    if origin is dict or kind is dict:
        return st.dictionaries(st.text(max_size=5), PLAIN, max_size=3)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return struct(kind)
    if kind is str and meta.pattern is not None:
        return st.from_regex(meta.pattern, fullmatch=True).map(lambda text: text.rstrip("\n"))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        type(None): st.none(),
        msgspec.UnsetType: st.just(msgspec.UNSET),
        bool: st.booleans(),
        int: st.integers(
            -(1 << 63) if meta.ge is None and meta.gt is None else int(meta.gt) + 1 if meta.gt else int(meta.ge or 0),
            int(meta.lt) - 1 if meta.lt is not None else int(meta.le) if meta.le is not None else (1 << 64) - 1,
        ),
        float: st.floats(min_value=meta.ge, max_value=meta.le, allow_nan=False),
        str: st.text(max_size=min(20, meta.max_length or 20)),
        bytes: st.binary(min_size=meta.min_length, max_size=meta.max_length)
        if meta.min_length
        else st.lists(st.integers(0, (1 << 64) - 1), max_size=4).map(frames.pack_digests),
    }
    return simple[kind]


def struct(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: values_of(hints[name]) for name in kind.__struct_fields__})


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("kind", PEER_TYPES)
def test_a_peers_message_survives_its_frame(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(struct(kind))
    frame = frames.encode_peer(message, node=1, incarnation=7, **IDENTITY)
    envelope, heard = frames.decode_peer(frame, **IDENTITY)
    assert (envelope.node, envelope.incarnation) == (1, 7)
    assert heard == message


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize(
    ("kind", "decode"),
    [
        *((kind, frames.decode_client) for kind in CLIENT_TYPES),
        *((kind, frames.decode_daemon) for kind in DAEMON_TYPES),
        *((kind, frames.decode_door) for kind in DOOR_TYPES),
        *((kind, frames.decode_trainer) for kind in TRAINER_TYPES),
        *((kind, frames.decode_gate) for kind in GATE_TYPES),
    ],
)
def test_a_message_of_this_host_survives_its_frame(
    kind: type[msgspec.Struct], decode: Any, data: st.DataObject
) -> None:
    message = data.draw(struct(kind))
    assert decode(frames.encode(message)) == message


@pytest.mark.parametrize("kind", CLIENT_TYPES)
def test_what_a_trainer_may_say_is_unknown_between_daemons(kind: type[msgspec.Struct]) -> None:
    if kind in PEER_TYPES:
        pytest.skip("said on both sides")
    frame = frames.encode_peer(_least(kind), node=1, incarnation=7, **IDENTITY)
    with pytest.raises(frames.FrameRefusedError) as refused:
        frames.decode_peer(frame, **IDENTITY)
    assert refused.value.code == "unknown"


@pytest.mark.parametrize("step", [-1, limits.STEP_MAX + 1])
def test_a_number_out_of_bounds_is_malformed(step: int) -> None:
    frame = frames.encode(messages.ReportWanted(step))
    with pytest.raises(frames.FrameRefusedError) as refused:
        frames.decode_client(frame.replace(b"ReportWanted", b"AskRestore"))
    assert refused.value.code == "malformed"


@pytest.mark.parametrize(
    "report",
    [
        {"held": [[1, step] for step in range(limits.SLOTS_COUNT_MAX + 1)]},
        {"open": [[1, step] for step in range(limits.SLOTS_COUNT_MAX + 1)]},
        {"committed": [1, -1]},
        {"committed": [1, limits.STEP_MAX + 1]},
        {"protect_s": math.nan},
        {"rebuild_s": -1.0},
        {"durable": {"age_s": math.inf}},
        {"pace": {"step_s": math.nan}},
        {"pace": {"cadences": [[1, 0, 0]]}},
    ],
    ids=str,
)
def test_a_report_that_nobody_could_make_is_malformed(report: dict[str, Any]) -> None:
    good = msgspec.to_builtins(messages.JobReport("a", 1, None, 0, None, None, (), ()))
    body = msgspec.to_builtins(messages.Heartbeat("", 1, 1, 0, 0, ())) | {"jobs": [good]}
    assert len(_decoded(body).jobs) == 1
    with pytest.raises(frames.FrameRefusedError) as refused:
        _decoded({**body, "jobs": [{**good, **report}]})
    assert refused.value.code == "malformed"


@pytest.mark.parametrize("layout", [{"every": 0}, {"first_step": -1}, {"shards": [[0, -1]]}, {"shards": [[4096, 1]]}])
def test_a_layout_that_nobody_could_agree_on_is_malformed(layout: dict[str, Any]) -> None:
    good = {"shards": [[0, 64]], "first_step": 0, "every": 1}
    said = {"type": "LayoutAnnounced", "job": "a", "attempt": 1, "current": True}
    assert _decoded({**said, "layout": good})
    with pytest.raises(frames.FrameRefusedError):
        _decoded({**said, "layout": {**good, **layout}})


def _decoded(body: dict[str, Any]) -> Any:
    envelope = {"version": limits.PROTOCOL_VERSION, "epoch": IDENTITY["epoch"], "cluster": IDENTITY["cluster"]}
    frame = msgspec.msgpack.encode(
        {**envelope, "node": 1, "incarnation": 7, "body": body, "config": IDENTITY["config"]}
    )
    return frames.decode_peer(frame, **IDENTITY)[1]


def test_no_two_conversations_use_one_tag_for_two_things() -> None:
    kinds = {*PEER_TYPES, *CLIENT_TYPES, *DAEMON_TYPES, *DOOR_TYPES}
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert len(tags) == len(set(tags))


def test_a_record_of_a_snapshot_is_two_numbers() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SnapshotId(2, 41))) == [2, 41]


def _least(kind: type[msgspec.Struct]) -> Any:
    """Some instance."""
    known: dict[str, Any] = {
        "job": "a",
        "snapshot": SnapshotId(1, 1),
        "layout": Layout((), 0, 1),
        "node": None,
        "reason": "",
    }
    fields = [field for field in msgspec.structs.fields(kind) if field.required]
    return kind(**{field.name: known.get(field.name, 0) for field in fields})
