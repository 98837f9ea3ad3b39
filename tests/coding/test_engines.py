"""Every engine, at every level that runs here, against the oracle and against reedsolo.

The fixture ``engine`` (conftest) goes through them. What a single engine has of its own is tested
in the file of its name.
"""

import ctypes
import hashlib
import itertools
import mmap
import threading
from collections.abc import Sequence

import holdfast.coding.native
import numpy as np
import numpy.typing as npt
import pytest
import reedsolo
from holdfast.coding import (
    Buffer,
    CodeParams,
    Engine,
    EngineUnavailableError,
    decode_matrix,
    engine_names,
    parity_matrix,
    select_engine,
    why_not_native,
)
from holdfast.coding.naive import NaiveEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Bytes = npt.NDArray[np.uint8]

# A function-scoped fixture is fine here: engines keep no state.
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD_LENGTHS = [*range(68), *range(120, 136), 255, 256, 257, 511, 513, 4095, 4096, 4097, 12289]


def buffers(rng: np.random.Generator, count: int, size: int, *, align: bool = False) -> list[Bytes]:
    """Random bytes at random offsets within a line, or all at the start of one."""
    views = []
    for _ in range(count):
        whole = np.frombuffer(bytearray(rng.bytes(size + 128)), dtype=np.uint8)
        to_line = -whole.ctypes.data % 64
        offset = to_line if align else int(rng.integers(0, 64))
        views.append(whole[offset : offset + size])
    return views


def encode(engine: Engine, params: CodeParams, data: Sequence[Bytes]) -> list[Bytes]:
    parity = [np.full(data[0].size, 0xA5, dtype=np.uint8) for _ in range(params.parity_count)]
    engine.matmul(parity_matrix(params), data, parity)
    return parity


def reedsolo_codec(params: CodeParams) -> reedsolo.RSCodec:
    return reedsolo.RSCodec(params.parity_count, nsize=params.total_count, fcr=0, generator=2, prim=0x11D)


@given(
    k=st.integers(1, 20),
    m=st.integers(1, 9),
    size=st.integers(0, 9000),
    accumulate=st.booleans(),
    align=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@PROPERTY
def test_any_product_is_the_oracles(
    engine: Engine, k: int, m: int, size: int, *, accumulate: bool, align: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 256, (m, k), dtype=np.uint8)
    sources = buffers(rng, k, size, align=align)
    results = buffers(rng, m, size, align=align)
    expected = [result.copy() for result in results]
    NaiveEngine().matmul(matrix, sources, expected, accumulate=accumulate)
    engine.matmul(matrix, sources, results, accumulate=accumulate)
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, right)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("align", [False, True])
def test_every_length_around_a_vector(engine: Engine, *, accumulate: bool, align: bool) -> None:
    rng = np.random.default_rng(1)
    for rows, size in itertools.product((1, 2, 3, 4, 5), ODD_LENGTHS):
        matrix = rng.integers(0, 256, (rows, 3), dtype=np.uint8)
        sources = buffers(rng, 3, size, align=align)
        results = buffers(rng, rows, size, align=align)
        expected = [result.copy() for result in results]
        NaiveEngine().matmul(matrix, sources, expected, accumulate=accumulate)
        engine.matmul(matrix, sources, results, accumulate=accumulate)
        assert [r.tobytes() for r in results] == [r.tobytes() for r in expected], (rows, size)


@pytest.mark.parametrize(("k", "m"), [(251, 4), (128, 127), (1, 254), (254, 1), (1, 1)])
def test_the_widest_codes(engine: Engine, k: int, m: int) -> None:
    rng = np.random.default_rng(k)
    params = CodeParams(k, m)
    data = buffers(rng, k, 97)
    expected = encode(NaiveEngine(), params, data)
    for result, right in zip(encode(engine, params, data), expected, strict=True):
        np.testing.assert_array_equal(result, right)


@given(k=st.integers(1, 32), m=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
@PROPERTY
def test_parity_is_byte_for_byte_reedsolos(engine: Engine, k: int, m: int, seed: int) -> None:
    params = CodeParams(k, m)
    data = buffers(np.random.default_rng(seed), k, 65)
    stream = bytes(reedsolo_codec(params).encode(np.stack(data).T.tobytes()))
    words = np.frombuffer(stream, dtype=np.uint8).reshape(65, k + m)
    np.testing.assert_array_equal(words[:, k:].T, np.stack(encode(engine, params, data)))


@given(k=st.integers(1, 10), m=st.integers(1, 4), seed=st.integers(0, 2**32 - 1), d=st.data())
@PROPERTY
def test_reedsolo_rebuilds_what_an_engine_encoded_and_so_does_the_engine(
    engine: Engine, k: int, m: int, seed: int, d: st.DataObject
) -> None:
    params = CodeParams(k, m)
    data = buffers(np.random.default_rng(seed), k, 33)
    chunks = data + encode(engine, params, data)
    lost = d.draw(st.lists(st.integers(0, k + m - 1), min_size=1, max_size=m, unique=True))

    words = np.stack(chunks).T.copy()
    words[:, lost] = 0
    for word, whole in zip(words, np.stack(chunks).T, strict=True):
        _, decoded, _ = reedsolo_codec(params).decode(bytearray(word), erase_pos=lost)
        assert bytes(decoded) == whole.tobytes()

    present = d.draw(st.permutations(sorted(set(range(k + m)) - set(lost))))[:k]
    rebuilt = [np.empty(33, dtype=np.uint8) for _ in lost]
    matrix = decode_matrix(params, available=present, wanted=lost)
    engine.matmul(matrix, [chunks[position] for position in present], rebuilt)
    for position, chunk in zip(lost, rebuilt, strict=True):
        np.testing.assert_array_equal(chunk, chunks[position])


@pytest.mark.parametrize(("k", "m"), [(1, 2), (2, 2), (4, 2), (3, 3), (5, 1)])
def test_every_erasure_of_small_codes_is_rebuilt(engine: Engine, k: int, m: int) -> None:
    params = CodeParams(k, m)
    data = buffers(np.random.default_rng(k), k, 70)
    chunks = data + encode(engine, params, data)
    for present in itertools.combinations(range(k + m), k):
        lost = sorted(set(range(k + m)) - set(present))
        rebuilt = [np.empty(70, dtype=np.uint8) for _ in lost]
        matrix = decode_matrix(params, available=present, wanted=lost)
        engine.matmul(matrix, [chunks[position] for position in present], rebuilt)
        for position, chunk in zip(lost, rebuilt, strict=True):
            np.testing.assert_array_equal(chunk, chunks[position])


def test_partial_sums_of_survivors_add_up_to_the_lost_chunk(engine: Engine) -> None:
    """A pipelined rebuild: each survivor adds its own part to what the one before sent."""
    params = CodeParams(5, 2)
    data = buffers(np.random.default_rng(2), 5, 300)
    chunks = data + encode(engine, params, data)
    present, lost = [6, 0, 2, 3, 5], [4, 1]
    matrix = decode_matrix(params, available=present, wanted=lost)
    totals = [np.zeros(300, dtype=np.uint8) for _ in lost]
    for column, position in enumerate(present):
        engine.matmul(matrix[:, [column]], [chunks[position]], totals, accumulate=True)
    for position, total in zip(lost, totals, strict=True):
        np.testing.assert_array_equal(total, chunks[position])


def test_a_delta_updates_parity_in_place(engine: Engine) -> None:
    """Parity ^= c * (old ^ new), as two sources with equal coefficients."""
    params = CodeParams(6, 3)
    rng = np.random.default_rng(3)
    data = buffers(rng, 6, 200)
    parity = encode(engine, params, data)
    changed = [chunk.copy() for chunk in data]
    changed[4] = buffers(rng, 1, 200)[0]
    matrix = parity_matrix(params)[:, [4, 4]]
    engine.matmul(matrix, [data[4], changed[4]], parity, accumulate=True)
    for result, right in zip(parity, encode(engine, params, changed), strict=True):
        np.testing.assert_array_equal(result, right)


# SHA-256 over the parity chunks of data that these tests make: the format of stored parity.
GOLDEN = {
    (4, 1): "15771c0ff06c939c2f15a91df7862ba72cf5d95e00a3ca77f2391866e8218e7e",
    (4, 2): "11a3154222e53dfcd12d3d96788c5d02e0dee17e83a215cb7613b5dce0e64b76",
    (6, 2): "0b140ef41738d07bbd1a8dacbcb4c64317d0fa3d659e0155033cafb50d6c9015",
    (10, 4): "9b37b66aa3c3c077163884d37dc924e6d3fd0bf2d32370e678fe46067f22e329",
    (16, 4): "8aa2f89267422c2c8102aaaf08a36e396032f1f4a42240dfb61d1893b94253b6",
    (33, 5): "a9de044bbac816f536932ebc20fa5f58cbde56ad7ef1fd0cc710f90e6a811bd2",
}


def golden_data(k: int) -> list[Bytes]:
    """Bytes that any language can make: chunk i, byte j is (i * 131 + j * j) mod 256."""
    j = np.arange(10_007, dtype=np.int64)
    return [((i * 131 + j * j) % 256).astype(np.uint8) for i in range(k)]


@pytest.mark.parametrize(("k", "m"), GOLDEN)
def test_the_bytes_of_parity_are_frozen(engine: Engine, k: int, m: int) -> None:
    parity = encode(engine, CodeParams(k, m), golden_data(k))
    assert hashlib.sha256(b"".join(chunk.tobytes() for chunk in parity)).hexdigest() == GOLDEN[k, m]


def test_sources_and_bytes_beside_the_results_stay_as_they_are(engine: Engine) -> None:
    rng = np.random.default_rng(4)
    for size, offset in itertools.product((1, 63, 64, 200, 4097), (0, 1, 64)):
        sources = buffers(rng, 9, size)
        before = [source.tobytes() for source in sources]
        wholes = [np.full(size + 256, 0xEE, dtype=np.uint8) for _ in range(5)]
        results = [whole[offset : offset + size] for whole in wholes]
        engine.matmul(rng.integers(0, 256, (5, 9), dtype=np.uint8), sources, results)
        assert [source.tobytes() for source in sources] == before
        for whole in wholes:
            assert (whole[:offset] == 0xEE).all()
            assert (whole[offset + size :] == 0xEE).all()


def guarded(libc: ctypes.CDLL, size: int, *, at_end: bool) -> tuple[mmap.mmap, Bytes]:
    """Memory that ends (or begins) at a page which nobody may touch."""
    page = mmap.PAGESIZE
    inner = -(-size // page) * page
    mapping = mmap.mmap(-1, inner + 2 * page)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    for guard in (whole.ctypes.data, whole.ctypes.data + page + inner):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    start = page + (inner - size if at_end else 0)
    return mapping, whole[start : start + size]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("size", [1, 31, 63, 65, 127, 4095, 4096, 5000, 20_000])
def test_no_byte_beyond_a_buffer_is_touched(engine: Engine, size: int, *, at_end: bool) -> None:
    """An access beyond the buffers ends the process here, as it would in production."""
    libc = ctypes.CDLL(None)
    kept = [guarded(libc, size, at_end=at_end) for _ in range(13)]
    views = [view for _, view in kept]
    rng = np.random.default_rng(5)
    for view in views:
        view[:] = rng.integers(0, 256, size, dtype=np.uint8)
    matrix = rng.integers(0, 256, (4, 9), dtype=np.uint8)
    expected = [np.empty(size, dtype=np.uint8) for _ in range(4)]
    NaiveEngine().matmul(matrix, views[:9], expected)
    engine.matmul(matrix, views[:9], views[9:])
    for result, right in zip(views[9:], expected, strict=True):
        np.testing.assert_array_equal(result, right)
    assert len(engine.fingerprint(views[0])) == 256


def test_threads_may_share_an_engine_and_its_sources(engine: Engine) -> None:
    params = CodeParams(4, 2)
    data = buffers(np.random.default_rng(6), 4, 50_000)
    expected = [chunk.tobytes() for chunk in encode(NaiveEngine(), params, data)]
    results: list[list[bytes]] = []

    def work() -> None:
        for _ in range(5):
            parity = encode(engine, params, data)
            results.append([chunk.tobytes() for chunk in parity])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [expected] * 20


def test_nothing_in_nothing_out(engine: Engine) -> None:
    engine.matmul(np.zeros((0, 0), dtype=np.uint8), [], [])
    engine.matmul(np.zeros((0, 2), dtype=np.uint8), [b"abc", b"def"], [])
    engine.matmul(np.ones((2, 2), dtype=np.uint8), [b"", b""], [bytearray(), bytearray()])
    result, kept = bytearray(b"\xff" * 7), bytearray(b"\xff" * 7)
    engine.matmul(np.zeros((1, 0), dtype=np.uint8), [], [result])
    engine.matmul(np.zeros((1, 0), dtype=np.uint8), [], [kept], accumulate=True)
    assert (result, kept) == (bytearray(7), bytearray(b"\xff" * 7))


def test_every_kind_of_buffer_is_taken(engine: Engine) -> None:
    content = bytes(range(64))
    words = np.frombuffer(content, dtype=np.uint32).reshape(4, 4)
    sources: list[Buffer] = [content, bytearray(content), memoryview(content)[:], words]
    result = np.zeros((8, 8), dtype=np.uint8)
    engine.matmul(np.array([[1, 1, 1, 2]], dtype=np.uint8), sources, [result])
    doubled = [a ^ b << 1 for a, b in zip(content, content, strict=True)]
    assert result.tobytes() == bytes(doubled)


def test_names_are_known_best_first_and_the_first_is_the_default() -> None:
    names = engine_names()
    assert names[-2:] == ("numpy", "naive")
    assert select_engine().name == names[0]
    for name in names:
        assert select_engine(name).name == name
        assert select_engine(name).detail


def test_an_unknown_engine_is_refused_with_what_there_is() -> None:
    with pytest.raises(EngineUnavailableError, match=r"'cuda'; known: native, isal, numpy, naive"):
        select_engine("cuda")


def test_an_engine_that_is_missing_here_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdfast.coding.native, "_BUILT", False)
    with pytest.raises(EngineUnavailableError, match=r"native engine is not built here.*usable here: .*numpy, naive"):
        select_engine("native")
    assert "not built here" in why_not_native()
    monkeypatch.undo()
    assert (why_not_native() == "") == ("native" in engine_names())
