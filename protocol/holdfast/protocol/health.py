"""What nodes say of resting memory: how well it is, and the conversation in which a group compares its stripes.

Between daemons only; part of the messages of `holdfast.protocol.messages`.
"""

from typing import Annotated, Literal

from holdfast.protocol import limits
from holdfast.protocol.fields import Count, JobName, Message
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
    scrub_age_s: float = 0.0  # since the last of these passes ended; 0 if none has
    scrub_s: float = 0.0  # how long that pass took


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
