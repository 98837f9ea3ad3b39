"""What nodes say of resting memory: how well it is, and the conversation in which a group compares its stripes.

Between daemons only; part of the messages of `holdfast.protocol.messages`.
"""

from typing import Annotated, Literal

from holdfast.protocol import limits
from holdfast.protocol.fields import Count, JobName, Message, Seconds, Text
from holdfast.protocol.ids import SnapshotId
from msgspec import Meta, Struct

FINGERPRINT_BYTES = 256
PackedFingerprints = Annotated[bytes, Meta(max_length=limits.AGREEMENT_STRIPES_MAX * FINGERPRINT_BYTES)]
StripeNumbers = Annotated[tuple[Count, ...], Meta(max_length=limits.AGREEMENT_STRIPES_MAX)]


class HealthReport(Struct, frozen=True):
    """How well what a node holds of a job's committed snapshot rests. Counts begin with its worker."""

    repaired_chunks: Count = 0  # failed their digest, or disagreed with their stripe, and were brought back
    damaged_chunks: Count = 0  # known to be wrong now, and not repaired yet
    disagreeing_stripes: Count = 0  # all digests right, and parity not that of the data
    scrub_passes: Count = 0  # how often all that is held was read again
    scrub_age_s: Seconds = 0.0  # since the last of these passes ended; 0 if none has
    scrub_s: Seconds = 0.0  # how long that pass took


class DrillReport(Struct, frozen=True):
    """The last drill of a job that ended on a node: what was sampled, and what it proved."""

    drills: Count = 0  # since the worker started
    drilled: SnapshotId | None = None
    proven: SnapshotId | None = None  # the same, if all that was sampled came out right
    survives: Count = 0  # losses of nodes that were proven to be survived
    stripes: Count = 0
    patterns: Count = 0  # sets of lost members, over all stripes
    columns: Count = 0  # bytes of a stripe that the independent witness rebuilt, over all patterns
    failures: Count = 0
    rebuild_bytes_per_s: Count = 0  # of lost bytes: fetching the others and computing
    problem: Text = ""
    age_s: Seconds = 0.0  # since it ended
    running: bool = False  # another one is under way


class DurableReport(Struct, frozen=True):
    """The copies of a job in the durable directory, as the node that makes them tells of them."""

    copied: SnapshotId | None = None  # the newest that is whole there, as far as it is known
    age_s: Seconds = 0.0  # since it was made
    seconds: Seconds = 0.0  # that making it took
    size_bytes: Count = 0
    failures: Count = 0  # in a row, since the last one that was made
    problem: Text = ""  # of the last try; empty once one has ended well
    running: bool = False  # one is being made


class DrillAsked(Message, frozen=True):
    """An operator asks for a drill of all jobs, of so many stripes on each node."""

    stripes: Annotated[int, Meta(ge=1, le=limits.DRILL_STRIPES_MAX)]
    pass_on: bool  # to the collector: tell all others


class WantFingerprints(Message, frozen=True):
    """I compare stripes; please send the fingerprints of your chunks in these."""

    job: JobName
    snapshot: SnapshotId
    stripes: StripeNumbers


class FingerprintsGiven(Message, frozen=True):
    """Fingerprints (256 bytes each, in order) of my chunks in these stripes; those that fail their digest are left out.

    The hearer ignores it when there are not as many fingerprints as stripes.
    """

    job: JobName
    snapshot: SnapshotId
    stripes: StripeNumbers
    fingerprints: PackedFingerprints


class ChunkSuspected(Message, frozen=True):
    """Your chunk disagrees with the rest of its stripe. Data is compared with `digest`, parity is encoded anew."""

    job: JobName
    snapshot: SnapshotId
    kind: Literal["data", "parity"]
    chunk: Count
    digest: Annotated[int, Meta(ge=0)] = 0  # of a data chunk, as I was told it before the snapshot was committed
