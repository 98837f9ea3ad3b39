"""The record that a recovery leaves on each node: one JSON file, whose schema is shipped beside this module.

Covers the shape. `recovery.schema.json` is made from these classes (`schema`); a test holds the two together, so that a
change of the shape is a change of a file that people's tools read.
"""

from typing import Annotated, Any, Literal

import msgspec
from holdfast.protocol.fields import Count, JobName, Text
from msgspec import Meta, Struct

SCHEMA_NAME = "holdfast.recovery/1"


class StepRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A snapshot."""

    step: Count
    attempt: Count


class PhaseRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One part of the recovery, on this node."""

    name: Literal["decide", "rebuild"]
    outcome: Annotated[str, Meta(description="done, or why not")]
    seconds: Annotated[float, Meta(ge=0)]
    received_bytes: Count = 0  # from other nodes
    lost_bytes: Count = 0  # that were to be brought back


class RecoveryRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One recovery of one job, as one node saw it."""

    cluster: Text
    epoch: Count
    node: Text
    job: JobName
    attempt: Annotated[int, Meta(ge=0, description="the job's life that began with it")]
    chosen: StepRecord
    lost_nodes: Annotated[
        tuple[Text, ...],
        Meta(description="that lacked the step; the collector's record names all, others themselves only"),
    ]
    refused: Annotated[tuple[Text, ...], Meta(description="newer steps, and why each was not chosen; by the collector")]
    phases: tuple[PhaseRecord, ...]
    digest_before: Annotated[
        str | None, Meta(description="of this node's image, over its chunks' digests; null: it was lost")
    ]
    digest_after: Annotated[str | None, Meta(description="the same now; null: it is not whole yet")]
    schema: Literal["holdfast.recovery/1"] = "holdfast.recovery/1"


def schema() -> dict[str, Any]:
    """The JSON schema of a record."""
    return msgspec.json.schema(RecoveryRecord)
