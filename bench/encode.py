"""How fast parity is made and lost chunks come back, beside what this machine's memory can do.

    python bench/encode.py [--codes 4+1,4+2,...] [--shard-mib 64] [--rounds 9] [--threads 1,2]
                           [--pages huge] [--gap-kib 1028] [--levels]

The first line describes the machine, each further line is a JSON object (schema
``holdfast.bench.encode/1``). All candidates of a code take turns within each round, together with
reading the same bytes (numpy's maximum) and copying them, so that ratios hold even where the
machine's speed changes from minute to minute. Rates are 10^9 bytes of *source* per second: median
and best over the rounds. "traffic" is rate * (k + m) / k, the bytes that cross the memory bus.

Case "encode" makes all m parity chunks in one call; case "row" one of them, which is what each of a
stripe's m parity holders computes.

Shards lie in shared memory (memfd, 4 KiB pages, populated beforehand), one mapping each, results in
others; with --pages huge in anonymous memory that asks for huge pages; with --gap-kib all in one
mapping, so far apart: wide codes depend on the placement. "isal" is called with pointers and tables
prepared beforehand, as its fastest user would.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from holdfast.coding import (
    CodeParams,
    Engine,
    chunk_digest,
    decode_matrix,
    engine_names,
    parity_matrix,
    select_engine,
)
from holdfast.coding.isal import IsalEngine
from holdfast.coding.native import NativeEngine, native_levels

Bytes = npt.NDArray[np.uint8]
Work = Callable[[], object]

MIB = 1 << 20
LINE_BYTES = 64
CACHED_SHARD_BYTES = 32 * 1024
# Fast calls are repeated until a sample is long enough for the clock.
SAMPLE_BYTES = 32 * MIB
SLOW_ENGINES = ("numpy", "naive")


def populated(size: int, *, huge: bool) -> Bytes:
    """A populated mapping of its own, filled with random bytes; it lives until the process ends."""
    if huge:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_HUGEPAGE)
    else:
        descriptor = os.memfd_create("holdfast-bench")
        os.ftruncate(descriptor, size)
        mapping = mmap.mmap(descriptor, size)
        os.close(descriptor)
    view = np.frombuffer(mapping, dtype=np.uint8)
    random = np.random.default_rng(size)
    for start in range(0, size, MIB):
        view[start : start + MIB] = random.integers(0, 256, min(MIB, size - start), dtype=np.uint8)
    return view


def shards(count: int, size: int, *, huge: bool, gap: int | None) -> list[Bytes]:
    """Memory for so many shards: a mapping each, or one for all with a gap of so many bytes between them."""
    if gap is None:
        return [populated(size, huge=huge) for _ in range(count)]
    arena = populated(count * (size + gap), huge=huge)
    return [arena[i * (size + gap) :][:size] for i in range(count)]


def parts_of(views: list[Bytes], threads: int) -> list[list[Bytes]]:
    """The byte range of all views, cut into one part per thread at a line's boundary."""
    size = views[0].size // threads // LINE_BYTES * LINE_BYTES
    return [[view[i * size : (i + 1) * size] for view in views] for i in range(threads)]


class Candidates:
    """Things to time on the same source bytes, in turns, on one or several threads."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.threads = threads
        self.parts: dict[str, list[Work]] = {}

    def add(self, name: str, parts: list[Work]) -> None:
        """One piece of work per thread, which together make one product."""
        assert len(parts) == self.threads
        self.parts[name] = parts
        self.run(name, 1)  # page faults and tables are no part of the measurement

    def run(self, name: str, repeats: int) -> None:
        """Every thread repeats its own part: handing over work would cost more than small parts."""

        def repeat(part: Work) -> None:
            for _ in range(repeats):
                part()

        if self.threads == 1:
            repeat(self.parts[name][0])
            return
        for future in [self.pool.submit(repeat, part) for part in self.parts[name]]:
            future.result()

    def rates(self, rounds: int, source_bytes: int) -> dict[str, list[float]]:
        """GB/s of source per candidate and round."""
        found: dict[str, list[float]] = {name: [] for name in self.parts}
        for _ in range(rounds):
            for name, samples in found.items():
                repeats = 1 if name in SLOW_ENGINES else max(1, SAMPLE_BYTES // source_bytes)
                start = time.perf_counter()
                self.run(name, repeats)
                samples.append(source_bytes * repeats / (time.perf_counter() - start) / 1e9)
        self.pool.shutdown()
        return found


def product(engine: Engine, matrix: Bytes, sources: list[Bytes], results: list[Bytes]) -> Work:
    ins, outs = [view.data for view in sources], [view.data for view in results]
    return lambda: engine.matmul(matrix, ins, outs)


def prepared_isal(matrix: Bytes, sources: list[Bytes], results: list[Bytes]) -> Work:
    """One call of ISA-L with everything made beforehand."""
    engine, (rows, columns) = IsalEngine(), matrix.shape
    tables = engine._tables(matrix.tobytes(), rows, columns)  # noqa: SLF001 - the reference, bare
    ins = (ctypes.c_void_p * columns)(*[view.ctypes.data for view in sources])
    outs = (ctypes.c_void_p * rows)(*[view.ctypes.data for view in results])
    call, size = engine._library.ec_encode_data, sources[0].size  # noqa: SLF001 - as above
    return lambda: call(size, columns, rows, tables, ins, outs)


def copy_all(sources: list[Bytes], target: Bytes) -> Work:
    def copy() -> None:
        for source in sources:
            np.copyto(target, source)

    return copy


def read_all(sources: list[Bytes]) -> Work:
    words = [source.view(np.uint64) for source in sources]
    return lambda: [part.max() for part in words]


def fingerprint_all(engine: Engine, sources: list[Bytes]) -> Work:
    return lambda: [engine.fingerprint(source) for source in sources]


def encode_engines(arguments: argparse.Namespace, *, cached: bool) -> Iterator[tuple[str, Engine]]:
    yield "native", NativeEngine()
    if arguments.levels:
        for level in native_levels():
            yield f"native-{level}", NativeEngine(level)
        yield "native-fetch", NativeEngine(stream=True, fetch=True)
        yield "native-nofetch", NativeEngine(stream=True, fetch=False)
        yield "native-cached", NativeEngine(stream=False, fetch=True)
    if cached:
        yield from ((name, select_engine(name)) for name in SLOW_ENGINES)


def measure_encode(
    arguments: argparse.Namespace, params: CodeParams, memory: list[Bytes], *, threads: int, rows: int
) -> None:
    k = params.data_count
    cached = memory[0].size == CACHED_SHARD_BYTES
    sources = parts_of(memory[:k], threads)
    results = parts_of(memory[-rows:], threads)
    matrix = parity_matrix(params)[-rows:]
    candidates = Candidates(threads)
    candidates.add("read", [read_all(part) for part in sources])
    pairs = zip(sources, results, strict=True)
    candidates.add("memcpy", [copy_all(part, into[0]) for part, into in pairs])
    for name, engine in encode_engines(arguments, cached=cached):
        parts = zip(sources, results, strict=True)
        candidates.add(name, [product(engine, matrix, ins, outs) for ins, outs in parts])
    if "isal" in engine_names():
        parts = zip(sources, results, strict=True)
        candidates.add("isal", [prepared_isal(matrix, ins, outs) for ins, outs in parts])
    found = candidates.rates(arguments.rounds, k * memory[0].size)
    report("row" if rows < params.parity_count else "encode", params, memory[0].size, threads, found)


def measure_rebuild(arguments: argparse.Namespace, params: CodeParams, memory: list[Bytes]) -> None:
    """Rebuild of 1 and 2 chunks beside the encoding of as many parity chunks."""
    k, m = params.data_count, params.parity_count
    candidates, engine = Candidates(1), NativeEngine()
    for lost_count in range(1, min(m, 2) + 1):
        lost = list(range(lost_count))
        present = [position for position in range(params.total_count) if position not in lost][:k]
        rebuild = decode_matrix(params, available=present, wanted=lost)
        encode = parity_matrix(params)[:lost_count]
        outs = memory[-lost_count:]
        candidates.add(f"encode {lost_count}", [product(engine, encode, memory[:k], outs)])
        candidates.add(f"rebuild {lost_count}", [product(engine, rebuild, memory[:k], outs)])
    found = candidates.rates(arguments.rounds, k * memory[0].size)
    report("rebuild", params, memory[0].size, 1, found)


def measure_digest(arguments: argparse.Namespace, params: CodeParams, memory: list[Bytes]) -> None:
    """Digest and encode chunk by chunk beside each alone; chunks of 1 MiB, as they travel."""
    k, m = params.data_count, params.parity_count
    matrix, engine, candidates = parity_matrix(params), NativeEngine(), Candidates(1)
    chunks = [
        ([v[at : at + MIB].data for v in memory[:k]], [v[at : at + MIB].data for v in memory[-m:]])
        for at in range(0, memory[0].size, MIB)
    ]

    def work(*, digest: bool, encode: bool) -> None:
        for ins, outs in chunks:
            if digest:
                for chunk in ins:
                    chunk_digest(chunk)
            if encode:
                engine.matmul(matrix, ins, outs)

    candidates.add("digest", [lambda: work(digest=True, encode=False)])
    candidates.add("encode", [lambda: work(digest=False, encode=True)])
    candidates.add("both", [lambda: work(digest=True, encode=True)])
    for name in ("native", "numpy"):
        prints = fingerprint_all(select_engine(name), memory[:k])
        candidates.add(f"fingerprint {name}", [prints])
    found = candidates.rates(arguments.rounds, k * memory[0].size)
    report("digest", params, memory[0].size, 1, found)


def measure_call() -> None:
    """What a call costs besides its bytes: 10 + 4 prepared buffers of 64 bytes."""
    params = CodeParams(10, 4)
    views = [np.zeros(64, dtype=np.uint8) for _ in range(params.total_count)]
    for name, engine in (("native", NativeEngine()), ("numpy", select_engine("numpy"))):
        call = product(engine, parity_matrix(params), views[:10], views[10:])
        count, samples = 2000 if name == "native" else 50, []
        for _ in range(9):
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples.append((time.perf_counter() - start) / count * 1e6)
        print_line({"case": "call", "engine": name, "us_median": statistics.median(samples)})


def report(case: str, params: CodeParams, size: int, threads: int, found: dict[str, list[float]]) -> None:
    """One line per candidate; ratios are medians of the ratios within each round."""
    k = params.data_count
    for name, samples in found.items():
        line: dict[str, object] = {
            "case": case,
            "k": k,
            "m": params.parity_count,
            "shard_bytes": size,
            "threads": threads,
            "engine": name,
            "gb_per_s_median": statistics.median(samples),
            "gb_per_s_best": max(samples),
        }
        if case in ("encode", "row") and name not in ("read", "memcpy"):
            if size > MIB:  # in cache the reader's own call is too slow to be a reference
                traffic = (k + (1 if case == "row" else params.parity_count)) / k
                line["traffic_over_read"] = traffic * ratio(samples, found["read"])
            line["over_memcpy"] = ratio(samples, found["memcpy"])
            if "isal" in found:
                line["over_isal"] = ratio(samples, found["isal"])
        if case == "rebuild" and name.startswith("rebuild"):
            line["over_encode"] = ratio(samples, found[name.replace("rebuild", "encode")])
        if name == "both":
            parts = zip(found["digest"], found["encode"], strict=True)
            line["over_apart"] = ratio(samples, [1 / (1 / d + 1 / e) for d, e in parts])
        print_line(line)


def ratio(samples: list[float], reference: list[float]) -> float:
    return statistics.median(s / r for s, r in zip(samples, reference, strict=True))


def print_line(line: dict[str, object]) -> None:
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps({"schema": "holdfast.bench.encode/1", **rounded}), flush=True)


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((s.split(":")[1].strip() for s in cpuinfo.splitlines() if "model name" in s), "?")
    details = ", ".join(f"{name}: {select_engine(name).detail}" for name in engine_names())
    python = platform.python_version()
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"# {model}, {os.cpu_count()} CPUs, {load}, {platform.platform()}, Python {python}; {details}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codes", default="4+1,4+2,6+2,8+2,10+4,16+4", help="k+m, ...")
    parser.add_argument("--shard-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, ...")
    parser.add_argument("--pages", choices=("4k", "huge"), default="4k")
    parser.add_argument("--gap-kib", type=int, help="all shards in one mapping, so far apart")
    parser.add_argument("--levels", action="store_true", help="every level and order of access")
    arguments = parser.parse_args()
    codes = [CodeParams(*map(int, code.split("+"))) for code in arguments.codes.split(",")]
    counts = [int(count) for count in arguments.threads.split(",")]
    print(machine(), flush=True)
    most = max(params.total_count for params in codes)
    for size in (CACHED_SHARD_BYTES, arguments.shard_mib * MIB):
        gap = None if arguments.gap_kib is None else arguments.gap_kib << 10
        memory = shards(most, size, huge=arguments.pages == "huge", gap=gap)
        for params in codes:
            for threads in counts:
                measure_encode(arguments, params, memory, threads=threads, rows=params.parity_count)
            if params.parity_count > 1:
                measure_encode(arguments, params, memory, threads=1, rows=1)
        if size > MIB:
            for params in codes:
                measure_rebuild(arguments, params, memory)
            measure_digest(arguments, codes[-1], memory)
    measure_call()
    return 0


if __name__ == "__main__":
    sys.exit(main())
