"""Chunks from one process to another over ZeroMQ on loopback, by the number of connections, beside raw TCP.

    python bench/connections.py [--mib 2048] [--rounds 5]

Sender and receiver are as the bulk plane is: one thread each, frames of 1 MiB sent without a copy and received as
frames, sockets with the plane's options; each connection is a PUSH socket, used in turn, all into one PULL socket. `one
in, one out` has every process do both at once, as nodes do. Digests, coding and the daemon are left out: this is
the most that connections could give. Prints the machine, then JSON lines in GB/s of one way, medians.
"""

import argparse
import multiprocessing as mp
import statistics
import sys
import time
from multiprocessing.connection import Connection
from threading import Thread

from holdfast.daemon.shell import network
from references import MIB, machine, raw_tcp, say

CHUNK_BYTES = 1 * MIB
WAIT_S = 120.0
CASES = ((1, 1), (1, 2), (2, 2), (4, 4))  # (connections, I/O threads)


class Side:
    """One process: what it receives on, and what it sends to."""

    def __init__(self, io_threads: int) -> None:
        self.context = network.Context(io_threads=io_threads)
        self.pull, self.port = network.bulk_pull(self.context, "127.0.0.1", frame_bytes_max=CHUNK_BYTES)

    def send(self, port: int, connections: int, count: int) -> None:
        """Send so many chunks, over the connections in turn."""
        pushes = [network.bulk_push(self.context, "127.0.0.1", port) for _ in range(connections)]
        chunk = memoryview(bytearray(CHUNK_BYTES))
        for index in range(count):
            push = pushes[index % connections]
            while not network.try_send(push, [b"header", chunk]):
                poller = network.Poller()
                poller.register(push, network.WRITABLE)
                poller.poll(1000)
        self.pushes = pushes  # closed with the context, once all has arrived

    def receive(self, count: int) -> float:
        """Take so many chunks; seconds from the first one on."""
        poller, left, started_s = network.Poller(), count, 0.0
        poller.register(self.pull, network.READABLE)
        while left:
            assert poller.poll(WAIT_S * 1000), "nothing comes"
            while left and network.try_receive(self.pull) is not None:
                started_s = started_s or time.monotonic()
                left -= 1
        return time.monotonic() - started_s


def far_end(pipe: Connection) -> None:
    """The other process: receives, and sends back where that is asked for."""
    while (order := pipe.recv()) is not None:
        connections, io_threads, count, port, both = order
        side = Side(io_threads)
        pipe.send(side.port)
        sender = Thread(target=side.send, args=(port, connections, count))
        if both:
            sender.start()
        pipe.send(side.receive(count))
        if both:
            sender.join()
        pipe.recv()
        side.context.destroy(linger=0)


def measure(pipe: Connection, connections: int, io_threads: int, count: int, *, both: bool) -> float:
    """Bytes per second of one way, once."""
    side = Side(io_threads)
    pipe.send((connections, io_threads, count, side.port, both))
    port = pipe.recv()
    sender = Thread(target=side.send, args=(port, connections, count))
    sender.start()
    own_s = side.receive(count) if both else 0.0
    seconds = max(own_s, pipe.recv())
    sender.join()
    pipe.send("done")
    side.context.destroy(linger=0)
    return count * CHUNK_BYTES / seconds


def main() -> int:
    """Run all cases, each round one after the other."""
    parser = argparse.ArgumentParser(description="what more connections to one peer would give, as JSON lines")
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    say(machine())
    pipe, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=far_end, args=(theirs,), daemon=True)
    process.start()
    rates: dict[tuple[str, int, int], list[float]] = {}
    tcp: list[float] = []
    for _ in range(arguments.rounds):
        tcp.append(arguments.mib * MIB / raw_tcp(arguments.mib * MIB))
        for connections, io_threads in CASES:
            for what in ("one way", "one in, one out"):
                rate = measure(pipe, connections, io_threads, arguments.mib, both=what != "one way")
                rates.setdefault((what, connections, io_threads), []).append(rate)
    pipe.send(None)
    process.join()
    say({"what": "raw TCP, one way", "gb_per_s": round(statistics.median(tcp) / 1e9, 2)})
    for (what, connections, io_threads), found in rates.items():
        say({
            "what": what, "connections": connections, "io_threads": io_threads, "rounds": len(found),
            "gb_per_s": round(statistics.median(found) / 1e9, 2), "min": round(min(found) / 1e9, 2),
            "max": round(max(found) / 1e9, 2),
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
