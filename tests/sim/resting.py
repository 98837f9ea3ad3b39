"""A simulated machine's hands for resting memory: read again, repair; and the hand that makes bits flip."""

from holdfast.coding import CodeParams, chunk_digest, select_engine
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.health import Resting
from holdfast.daemon.shell.drilling import drill
from holdfast.daemon.shell.scrubber import recompute

ENGINE = select_engine("numpy")


def resting(data: bytearray, parity: bytearray, wanted: Resting, chunk_bytes: int) -> memoryview:
    """One chunk of a slot's memory."""
    held = memoryview(data if wanted.kind == "data" else parity)
    return held[wanted.chunk * chunk_bytes : (wanted.chunk + 1) * chunk_bytes]


def scrubbed(action: actions.ScrubChunks, data: bytearray, parity: bytearray, chunk_bytes: int) -> events.Event:
    """Read chunks, compare, take fingerprints."""
    chunks = [(wanted, resting(data, parity, wanted, chunk_bytes), digest) for wanted, digest in action.chunks]
    bad = tuple(wanted for wanted, chunk, digest in chunks if chunk_digest(chunk) != digest)
    prints = tuple(b"" if wanted in bad else ENGINE.fingerprint(chunk) for wanted, chunk, _ in chunks)
    told = prints if action.fingerprints else ()
    return events.ChunksScrubbed(action.memory, action.snapshot, action.ticket, bad, told)


def repaired(
    action: actions.RepairChunk, data: bytearray, parity: bytearray, params: CodeParams, sources: dict[int, bytes]
) -> events.Event:
    """Compute a chunk again, and write it if it is right."""
    chunk_bytes = len(next(iter(sources.values())))
    wanted = Resting(action.kind, action.chunk)
    place = resting(data, parity, wanted, chunk_bytes)
    made = recompute(ENGINE, params, action, {p: memoryview(s) for p, s in sources.items()}, chunk_bytes)
    changed = made is not None and made != place
    if made is not None and changed:
        place[:] = made
    good, digest = made is not None, chunk_digest(place)
    return events.ChunkRepaired(action.memory, action.snapshot, wanted, digest, good, changed, action.number)


def drilled(
    action: actions.DrillStripe, data: bytearray, parity: bytearray, params: CodeParams, sources: dict[int, bytes]
) -> events.Event:
    """Rebuild a stripe as if members were lost."""
    position, own, digest = action.own
    chunk_bytes = len(next(iter(sources.values()))) if sources else 64
    chunk = resting(data, parity, own, chunk_bytes)
    chunks = {**{p: memoryview(source) for p, source in sources.items()}, position: memoryview(bytes(chunk))}
    wrong, _ = drill(ENGINE, params, action, chunks, own_good=chunk_digest(chunk) == digest)
    return events.StripeDrilled(
        action.memory, action.snapshot, action.stripe, wrong, coded_ns=1000, pattern_count=len(action.patterns)
    )
