"""Bytes that a socket or the ledger may bring: ``python tests/fuzz/fuzz.py --inputs 1000000 --seed 1``.

Real frames of a simulated cluster are cut, spliced, flipped and rewritten value by value. Each must decode or be
refused by name; what decodes as a peer's or client's message is handed to a real core, which must take it without an
exception and with its invariants whole. The slowest input and the growth of the process are reported and bounded.
"""

import argparse
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
from holdfast.daemon.core import events
from holdfast.daemon.core.ledger import decode_ledger
from holdfast.daemon.core.node import Node
from holdfast.protocol import frames
from sim.cluster import Cluster, ClusterShape
from sim.ranks import JobShape

SAMPLES_PER_KIND = 24
SECONDS_PER_INPUT_MAX = 1.0  # a thousand times what the slowest takes on an idle machine
GROWTH_BYTES_MAX = 400 << 20
INPUTS_PER_NODE = 5_000  # then a fresh cluster: nonsense must not pile up into a state that no peer could cause
NUMBERS = (0, 1, 2, 3, 7, 8, 63, 64, 255, 4095, 4096, 2**31, 2**32, 2**62, 2**63 - 1, 2**64 - 1, -1)
TEXTS = ("", "a", "b", "n0", "nobody", "x" * 200, "data", "parity", "\udc80".encode("utf-8", "surrogatepass").hex())


class SlowInputError(AssertionError):
    """One input took longer than any may."""


@dataclass
class Prey:
    """A small cluster at work, and the frames that it has sent."""

    seed: int
    cluster: Cluster = field(init=False)
    samples: dict[str, list[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        jobs = (
            JobShape("a", ((0, 300), (1, 500), (1, 65), (2, 64)), step_s=0.3),
            JobShape("b", ((2, 130),), step_s=0.5),
        )
        shape = ClusterShape(node_count=4, parity=2, group_size=4, jobs=jobs)
        self.cluster = Cluster(self.seed, shape)
        encode = frames.encode

        def recording(message: msgspec.Struct) -> bytes:
            frame = encode(message)
            kind = type(message).__name__
            if isinstance(message, frames.Envelope):
                kind = "peer " + str(msgspec.msgpack.decode(message.body)["type"])
            kept = self.samples.setdefault(kind, [])
            if len(kept) < SAMPLES_PER_KIND:
                kept.append(frame)
            return frame

        frames.encode = recording
        try:
            self.cluster.start()
            self.cluster.crash_worker(2)
            self.cluster.world.run_until(lambda: False, deadline_s=6.0)
            self.cluster.jobs[0].kill("to hear how it restores")
            self.cluster.world.run_until(lambda: False, deadline_s=12.0)
            self.cluster.lose_node(3, back_after_s=0.5)
            self.cluster.world.run_until(lambda: False, deadline_s=20.0)
        finally:
            frames.encode = encode
        self.samples["ledger"] = [m.ledger for m in self.cluster.machines if m.ledger is not None]

    def node(self) -> tuple[Node, int, int]:
        """A core at work, its clock, and a client of it."""
        worker = next(machine.worker for machine in self.cluster.machines if machine.worker is not None)
        client = worker.attach(lambda _: None, lambda: None)
        return worker.node, worker.machine.clock_ns, client.number


class Fuzzer:
    """One seed's worth of nonsense."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.seed, self.round = seed, 0
        self.ends: Counter[str] = Counter()
        self.slowest: tuple[float, str] = (0.0, "")
        self._renew()

    def _renew(self) -> None:
        self.round += 1
        self.prey = Prey(self.draw.randrange(1 << 30))
        self.node, self.now_ns, self.client = self.prey.node()
        self.config = self.node.ctx.config
        self.identity = {
            "cluster": self.config.cluster_name,
            "epoch": self.config.epoch,
            "config": self.node.ctx.config_digest,
        }

    # --- inputs ---

    def _cut(self, frame: bytes) -> bytes:
        draw, changed = self.draw, bytearray(frame)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(changed) + 1)
            match draw.randrange(5):
                case 0:
                    del changed[place:]
                case 1:
                    changed[place:place] = draw.randbytes(draw.randint(1, 9))
                case 2 if place < len(changed):
                    changed[place] ^= 1 << draw.randrange(8)
                case 3 if place < len(changed):
                    changed[place] = draw.choice(b"\x00\x7f\x80\x90\xa0\xc0\xc1\xc6\xcf\xd9\xdc\xdd\xdf\xff")
                case _:
                    other = draw.choice(self.prey.samples[draw.choice(sorted(self.prey.samples))])
                    changed[place:] = other[draw.randrange(len(other) + 1) :]
        return bytes(changed)

    def _rewrite(self, value: object) -> object:
        draw = self.draw
        match value:
            case dict():
                key = draw.choice(sorted(value, key=str)) if value else None
                return {k: self._rewrite(v) if k == key and k != "type" else v for k, v in value.items()}
            case list():
                place = draw.randrange(len(value) + 1)
                again = [self._rewrite(v) if index == place else v for index, v in enumerate(value)]
                return again if draw.random() < 0.8 else again[:place] + again[:place]
            case bool() | None:
                return draw.choice([True, False, None, 1])
            case int() | float():
                return draw.choice(NUMBERS) if draw.random() < 0.5 else int(value) + draw.randint(-3, 3)
            case str():
                return draw.choice(TEXTS)
            case bytes():
                return draw.randbytes(8 * draw.randint(0, 40)) if draw.random() < 0.8 else value[:-1]
        return value

    def _nonsense(self, frame: bytes) -> bytes:
        if self.draw.random() < 0.4:
            return self._cut(frame)
        try:
            value = msgspec.msgpack.decode(frame)
            if isinstance(value, dict) and isinstance(value.get("body"), dict) and self.draw.random() < 0.95:
                value["body"] = self._rewrite(value["body"])
            else:
                value = self._rewrite(value)
            return msgspec.msgpack.encode(value)
        except (msgspec.DecodeError, OverflowError, UnicodeError, ValueError):
            return self._cut(frame)

    # --- what hears them ---

    def _peer(self, frame: bytes) -> None:
        envelope, message = frames.decode_peer(frame, **self.identity)  # type: ignore[arg-type]  # three known keys
        if envelope.node < len(self.config.nodes) and envelope.node != self.node.ctx.node:  # the shell checks this
            self._happens(events.PeerSaid(envelope.node, envelope.incarnation, message))

    def _client(self, frame: bytes) -> None:
        self._happens(events.ClientSaid(self.client, frames.decode_client(frame)))

    def _header(self, frame: bytes) -> None:
        header = frames.decode_header(frame, cluster=self.config.cluster_name, epoch=self.config.epoch)
        self._happens(events.ChunkArrived(header, self.draw.randrange(1 << 64)))

    def _happens(self, event: events.Event) -> None:
        self.now_ns += self.draw.randrange(1_000_000)
        self.node.handle(event, self.now_ns)
        self.node.check()

    @staticmethod
    def _ledger(payload: bytes) -> None:
        try:
            decode_ledger(payload)
        except msgspec.DecodeError as error:
            raise frames.FrameRefusedError("malformed", str(error)) from error

    def one(self) -> None:
        """One input."""
        kind = self.draw.choice(sorted(self.prey.samples))
        frame = self._nonsense(self.draw.choice(self.prey.samples[kind]))
        hears: Callable[[bytes], object]
        if kind.startswith("peer "):
            hears = self._peer
        elif kind == "ChunkHeader":
            hears = self._header
        elif kind == "ledger":
            hears = self._ledger
        else:
            hears = self.draw.choice(
                [self._client, self._client, frames.decode_daemon, frames.decode_door, frames.decode_refusal]
            )
        started_s = time.perf_counter()
        try:
            hears(frame)
            self.ends["taken"] += 1
        except frames.FrameRefusedError as refusal:
            self.ends[refusal.code] += 1
        except Exception as error:
            raise AssertionError(f"seed {self.seed}, round {self.round}, {kind}: {error!r} of {frame.hex()}") from error
        taken_s = time.perf_counter() - started_s
        self.slowest = max(self.slowest, (taken_s, kind))
        if taken_s > SECONDS_PER_INPUT_MAX:
            raise SlowInputError(f"{kind}: {taken_s:.2f} s for {frame!r}")

    def run(self, count: int) -> None:
        """Many inputs; raises on the first that is neither taken nor refused, or costs too much."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            if number and number % INPUTS_PER_NODE == 0:
                self._renew()
            self.one()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < GROWTH_BYTES_MAX, f"the process grew by {grown} bytes"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="nonsense for every decoder and for the core")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started_s = time.monotonic()
    fuzzer = Fuzzer(options.seed)
    fuzzer.run(options.inputs)
    print(
        f"{options.inputs} inputs, seed {options.seed}, {time.monotonic() - started_s:.0f} s: {dict(fuzzer.ends)}; "
        f"slowest {fuzzer.slowest[0] * 1e3:.1f} ms ({fuzzer.slowest[1]})"
    )


if __name__ == "__main__":
    main()
