"""Every kind of bytes that a socket may bring or that is read back: ``make fuzz INPUTS=1000000 FUZZ_SEED=1``.

Real messages are cut, spliced, flipped and rewritten value by value, and others are made by their type with values
that mean something to who hears them. Each must be taken, or refused by name; a core that hears one must stay whole,
and what it decides must be fit to be sent. CPU per input and memory per batch are measured and bounded. An input that
breaks a rule is printed with the command that brings it back.
"""

import argparse
import gc
import logging
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fuzz.core_surfaces import Bulk, Clients, Peers
from fuzz.file_surfaces import Copies, Records, Shards, Texts
from fuzz.local_surfaces import Environment, Http, Keepers, Ledger, Replies
from fuzz.prey import Prey
from fuzz.remote_surface import Gate
from fuzz.sealed_surface import Sealed
from fuzz.surface import Surface

CPU_S_MAX = 1.0  # of one input; a hundred times what most of the slowest take
HANG_S = 60  # an input that takes so long is stopped: a loop that hangs would never be measured
BATCH_GROWTH_BYTES_MAX = 64 << 20  # of the process while it hears a batch: ten times what the largest frames leave
ROUND_GROWTH_BYTES_MAX = 192 << 20  # of the process from the second round on: a leak would pass that within a million
SHOWN_BYTES = 600  # of an input that breaks a rule
BATCH_INPUTS = 200
ROUND_INPUTS = 5_000  # then everything is made anew: nonsense must not pile up into a state that no peer could cause
SHARES = {
    "control frames": 30, "client messages": 15, "bulk frames": 7, "sealed chunks": 3, "replies to clients": 8,
    "http requests": 6, "trainers over the network": 3,
    "ledger": 6, "keeper and worker": 6, "service manager": 1, "config and key files": 5, "records and reports": 4,
    "durable copies": 2, "shards and exports": 4,
}  # fmt: skip
assert sum(SHARES.values()) == 100


class BrokenRuleError(AssertionError):
    """An input was neither taken nor refused by name, or it cost too much."""


@dataclass
class Told:
    """What came of one surface's inputs."""

    inputs: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: bytes = b""
    growth_bytes: int = 0  # the most that the process grew within a batch

    def row(self, name: str) -> str:
        """One line of the report."""
        taken = self.ends[""]
        refused = ", ".join(f"{end} {count}" for end, count in self.ends.most_common() if end)
        return (
            f"{name:22} {self.inputs:8} {taken:8} {self.inputs - taken:8} {self.slowest_s * 1e3:9.1f} "
            f"{self.growth_bytes / 2**20:8.1f}  {refused}"
        )


class Fuzzer:
    """One seed's worth of nonsense."""

    def __init__(self, seed: int, *, first_round: int = 0) -> None:
        self.seed, self.round = seed, first_round
        self.told: dict[str, Told] = {name: Told() for name in SHARES}
        self.first_resident_bytes = 0

    def run(self, count: int) -> None:
        """So many inputs in all; raises on the first that breaks a rule."""
        while count > 0:
            self._round(min(count, ROUND_INPUTS))
            count -= ROUND_INPUTS

    def _surfaces(self) -> list[Surface]:
        def draw(name: str) -> random.Random:
            return random.Random(f"{self.seed}/{self.round}/{name}")

        prey = Prey(draw("prey").randrange(1 << 30))
        return [
            Peers(draw("control"), prey), Clients(draw("client"), prey), Bulk(draw("bulk"), prey),
            Sealed(draw("sealed")),
            Replies(draw("reply"), prey), Http(draw("http"), prey), Ledger(draw("ledger"), prey),
            Keepers(draw("keeper")), Environment(draw("environment")), Texts(draw("text")), Records(draw("record")),
            Copies(draw("copy")), Shards(draw("shard")), Gate(draw("gate"), prey),
        ]  # fmt: skip

    def _round(self, count: int) -> None:
        surfaces = self._surfaces()
        try:
            left = {surface.name: max(SHARES[surface.name] * count // 100, 1) for surface in surfaces}
            while any(left.values()):
                for surface in surfaces:
                    batch = min(left[surface.name], max(BATCH_INPUTS * SHARES[surface.name] // 10, 1))
                    left[surface.name] -= batch
                    self._batch(surface, batch)
        finally:
            for surface in surfaces:
                surface.close()
        self.round += 1
        del surfaces
        gc.collect()
        resident_bytes = memory_bytes("VmRSS")
        self.first_resident_bytes = self.first_resident_bytes or resident_bytes
        grown = resident_bytes - self.first_resident_bytes
        if grown > ROUND_GROWTH_BYTES_MAX:
            raise BrokenRuleError(f"seed {self.seed}: the process grew by {grown} bytes in {self.round} rounds")

    def _batch(self, surface: Surface, count: int) -> None:
        told = self.told[surface.name]
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before = memory_bytes("VmRSS")
        for _ in range(count):
            self._one(surface, told)
        grown = memory_bytes("VmHWM") - before
        told.growth_bytes = max(told.growth_bytes, grown)
        if grown > BATCH_GROWTH_BYTES_MAX:
            raise BrokenRuleError(f"{self._where(surface)}: {grown} bytes of growth within {count} inputs")

    def _one(self, surface: Surface, told: Told) -> None:
        made = surface.make()
        surface.spent_s = 0.0
        signal.alarm(HANG_S)
        try:
            end = surface.feed(made)
        except Exception as error:
            raise BrokenRuleError(f"{self._where(surface)}: {error!r} of {made[:SHOWN_BYTES]!r}") from error
        finally:
            signal.alarm(0)
        told.inputs += 1
        told.ends[end] += 1
        if surface.spent_s > told.slowest_s:
            told.slowest_s, told.slowest = surface.spent_s, made
        if surface.spent_s > CPU_S_MAX:
            raise BrokenRuleError(f"{self._where(surface)}: {surface.spent_s:.2f} s of CPU for {made[:SHOWN_BYTES]!r}")

    def _where(self, surface: Surface) -> str:
        again = f"python -m fuzz.fuzz --inputs {ROUND_INPUTS} --seed {self.seed} --round {self.round}"
        return f"{surface.name}, input {self.told[surface.name].inputs}, again with '{again}'"

    def report(self) -> str:
        """A table, and the worst input of all."""
        head = f"{'':22} {'inputs':>8} {'taken':>8} {'refused':>8} {'worst ms':>9} {'MiB':>8}  refused as"
        name, worst = max(self.told.items(), key=lambda item: item[1].slowest_s)
        shown = worst.slowest[:200]
        return "\n".join(
            [
                head,
                *(told.row(name) for name, told in self.told.items()),
                f"worst: {worst.slowest_s * 1e3:.1f} ms, {name}, {len(worst.slowest)} bytes: {shown!r}",
            ]
        )


def memory_bytes(line: str) -> int:
    """A line of this process's status."""
    for found in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if found.startswith(f"{line}:"):
            return int(found.split()[1]) * 1024
    raise AssertionError(line)


def stop_hanging(number: int, frame: FrameType | None) -> None:
    """Called in the middle of an input that takes too long."""
    raise BrokenRuleError(f"signal {number}: an input takes more than {HANG_S} s, now at {frame}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="nonsense for everything that hears or reads bytes")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, default=0, help="begin with this round, to bring a failure back")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, stop_hanging)
    started_s = time.monotonic()
    fuzzer = Fuzzer(options.seed, first_round=options.round)
    try:
        fuzzer.run(options.inputs)
    except BrokenRuleError as broken:
        print(fuzzer.report())
        print(f"BROKEN: {broken}")
        raise
    total = sum(told.inputs for told in fuzzer.told.values())
    print(fuzzer.report())
    print(f"{total} inputs, seed {options.seed}, {time.monotonic() - started_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
