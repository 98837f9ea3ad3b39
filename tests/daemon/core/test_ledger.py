"""The ledger's bytes: what is written is read, and anything else is refused with one kind of error."""

import msgspec
import pytest
from holdfast.daemon.core.ledger import JobRecord, LedgerRecord, SlotRecord, decode_ledger, encode_ledger
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = Layout((ShardPlace(0, 64), ShardPlace(1, 128)), 0, 5, 2)
RECORD = LedgerRecord(
    cluster="lab",
    epoch=3,
    node=1,
    incarnation=7,
    worker_session=2,
    jobs=(
        JobRecord(
            name="gpt",
            attempt=2,
            current_layout_id=LAYOUT.layout_id,
            layouts=(LAYOUT,),
            committed=SnapshotId(2, 40),
            committed_layout_id=LAYOUT.layout_id,
            given_up=(SnapshotId(2, 41),),
            slots=(
                SlotRecord(generation=1, phase="committed", snapshot=SnapshotId(2, 40), layout_id=LAYOUT.layout_id),
            ),
            closed=False,
        ),
    ),
)


def test_what_is_written_is_read() -> None:
    assert decode_ledger(encode_ledger(RECORD)) == RECORD


def test_bytes_that_are_no_text_are_refused_as_everything_else_is() -> None:
    payload = encode_ledger(RECORD).replace(b"committed\xa8", b"commit\xff\xfe\xfd\xa8")
    assert payload != encode_ledger(RECORD)
    with pytest.raises(msgspec.DecodeError):
        decode_ledger(payload)


@given(st.integers(0, len(encode_ledger(RECORD)) - 1), st.binary(max_size=4))
def test_changed_bytes_are_read_or_refused(place: int, change: bytes) -> None:
    payload = encode_ledger(RECORD)
    changed = payload[:place] + change + payload[place + 1 :]
    try:
        assert isinstance(decode_ledger(changed), LedgerRecord)
    except msgspec.DecodeError:
        assert changed != payload


def test_a_record_that_contradicts_itself_is_refused() -> None:
    (job,) = RECORD.jobs
    plain = msgspec.to_builtins(job)
    twice = {**plain, "slots": plain["slots"] * 2}
    others = {**msgspec.to_builtins(RECORD), "jobs": []}
    for wrong in (
        encode_ledger(RECORD).replace(msgspec.msgpack.encode(LAYOUT.layout_id), msgspec.msgpack.encode(1 << 63 | 1), 1),
        msgspec.msgpack.encode({**others, "jobs": [plain] * 2}),
        msgspec.msgpack.encode({**others, "jobs": [twice]}),
    ):
        with pytest.raises(msgspec.DecodeError):
            decode_ledger(wrong)
