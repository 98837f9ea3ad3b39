"""The schema that is shipped is that of the records; what does not fit it is refused."""

import json
from importlib.resources import files

import msgspec
import pytest
from holdfast.protocol.recovery import SCHEMA_NAME, PhaseRecord, RecoveryRecord, StepRecord, schema

RECORD = RecoveryRecord(
    cluster="lab", epoch=1, node="n0", job="gpt", attempt=2, chosen=StepRecord(7, 1), lost_nodes=("n1",),
    refused=("step 8 (attempt 1) is not recoverable",),
    phases=(PhaseRecord("decide", "done", 0.2), PhaseRecord("rebuild", "done", 1.5, 4096, 4096)),
    digest_before=None, digest_after="00ff00ff00ff00ff",
)  # fmt: skip


def test_the_shipped_schema_is_that_of_the_records() -> None:
    """After a change: ``python -c "import json; from holdfast.protocol.recovery import schema;
    print(json.dumps(schema(), indent=2))" > protocol/holdfast/protocol/recovery.schema.json``."""
    shipped = files("holdfast.protocol").joinpath("recovery.schema.json").read_text(encoding="utf-8")
    assert json.loads(shipped) == schema()


def test_a_record_is_one_json_object_and_comes_back() -> None:
    written = msgspec.json.encode(RECORD)
    assert json.loads(written)["schema"] == SCHEMA_NAME
    assert msgspec.json.decode(written, type=RecoveryRecord) == RECORD


@pytest.mark.parametrize(
    "change", [{"schema": "holdfast.recovery/2"}, {"attempt": -1}, {"phases": [{"name": "rest"}]}, {"more": 1}]
)
def test_what_is_no_record_is_refused(change: dict[str, object]) -> None:
    wrong = {**json.loads(msgspec.json.encode(RECORD)), **change}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps(wrong), type=RecoveryRecord)
