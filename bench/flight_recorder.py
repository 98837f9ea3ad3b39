"""What it costs a daemon that it remembers what happened, whether anybody asks or not.

    python bench/flight_recorder.py [--rounds 9]

The first line describes the machine, each further line is a JSON object (schema ``holdfast.bench.recorder/1``):
nanoseconds per event or action of a kind, the best of the rounds, and its ratio to digesting one chunk of 64 KiB, the
smallest that there is, which happens at least twice to each chunk that is sent. The last lines are what asking for
everything costs.
"""

import argparse
import timeit
from collections.abc import Callable

from holdfast.coding import chunk_digest
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.trace import Trace
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.trace import TraceGiven
from references import machine, say

CALLS = 20_000
SNAPSHOT, MEMORY = SnapshotId(1, 5), Memory("gpt", 0, 1)
HEADER = messages.ChunkHeader("lab", 1, 1, 1, "gpt", SNAPSHOT, 1, "data", 3, reading=False)


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    trace, chunk = Trace(0), bytes(limits.CHUNK_BYTES_MIN)
    step = iter(range(1 << 40))
    beat = messages.Heartbeat("digest", 1, 1, 0, 0, ())
    seen: dict[str, events.Event] = {
        "time passed": events.TimePassed(1),
        "heartbeat": events.PeerSaid(1, 1, beat),
        "chunk arrived": events.ChunkArrived(HEADER, 5),
        "chunk acknowledged": events.PeerSaid(1, 1, messages.ChunkReply("gpt", SNAPSHOT, 3, ok=True)),
        "chunks digested": events.ChunksDigested(MEMORY, SNAPSHOT, 0, (1, 2)),
    }
    cases: dict[str, Callable[[], object]] = {
        kind: lambda event=event: trace.saw(event, 7)  # type: ignore[misc]  # bound now
        for kind, event in seen.items()
    }
    cases["chunk sent"] = lambda: trace.did(actions.SendChunk(1, MEMORY, HEADER))
    cases["a new span, the oldest forgotten"] = lambda: trace.start("stage", "gpt", SnapshotId(1, next(step)))
    say(machine())
    reference_ns = best_ns(lambda: chunk_digest(chunk), rounds)
    for kind, work in cases.items():
        took_ns = best_ns(work, rounds)
        told = {"kind": kind, "ns": round(took_ns), "of_a_chunk_s_digest": round(took_ns / reference_ns, 3)}
        say({"schema": "holdfast.bench.recorder/1", "what": "look", **told})
    answer = TraceGiven(1, 0, trace.told(limits.TRACE_SPANS_KEPT))
    assert answer.trace is not None
    asked_ns = best_ns(lambda: frames.encode(TraceGiven(1, 0, trace.told(limits.TRACE_SPANS_KEPT))), rounds, calls=5)
    whole = {
        "spans": len(answer.trace.spans),
        "frame_bytes": len(frames.encode(answer)),
        "ms": round(asked_ns / 1e6, 2),
    }
    say({"schema": "holdfast.bench.recorder/1", "what": "asked for all", **whole})


def best_ns(work: Callable[[], object], rounds: int, calls: int = CALLS) -> float:
    """Nanoseconds of one call."""
    return min(timeit.repeat(work, number=calls, repeat=rounds)) / calls * 1e9


if __name__ == "__main__":
    main()
