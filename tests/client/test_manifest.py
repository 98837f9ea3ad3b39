"""The shard's format: what is written is read again, and nothing else is."""

import itertools

import msgspec
import pytest
from holdfast.client.manifest import (
    ALIGN_BYTES,
    FORMAT_VERSION,
    HEADER_BYTES,
    ITEM_BYTES,
    Header,
    Manifest,
    Mesh,
    ParsedShard,
    Sharding,
    TensorEntry,
    align,
    digest_of,
    encode_manifest,
    is_dense,
    parse_shard,
    plan_header,
    show_path,
)
from holdfast.client.state_errors import MalformedShardError
from hypothesis import given
from hypothesis import strategies as st

MESH = Mesh(device_type="cpu", shape=(2,), dim_names=("data",), ranks=(0, 1))
SHARDING = Sharding(global_shape=(7, 3), global_offset=(4, 0), placements=("shard:0",), mesh_index=0)


def entry(**changes: object) -> TensorEntry:
    fields: dict[str, object] = {
        "path": ("model", "weight"),
        "dtype": "float32",
        "shape": (3, 3),
        "stride": None,
        "offset": 64,
        "size_bytes": 36,
        "lazy": True,
        "sharding": SHARDING,
    }
    return TensorEntry(**{**fields, **changes})  # type: ignore[arg-type]  # the test's own fields


def manifest(*entries: TensorEntry, payload_bytes: int = 128, names: tuple[str, ...] = ("model",)) -> Manifest:
    return Manifest(
        version=FORMAT_VERSION,
        names=names,
        tensors=entries,
        meshes=(MESH,),
        payload_bytes=payload_bytes,
        objects_capacity_bytes=128,
    )


def shard_of(record: Manifest, objects: bytes = b"objects") -> bytearray:
    encoded = encode_manifest(record)
    header = plan_header(len(encoded), 128, record.payload_bytes)._replace(objects_bytes=len(objects))
    shard = bytearray(header.shard_bytes)
    shard[:HEADER_BYTES] = header.pack()
    shard[HEADER_BYTES : HEADER_BYTES + len(encoded)] = encoded
    shard[header.objects_offset : header.objects_offset + len(objects)] = objects
    return shard


def test_what_is_written_is_read_again() -> None:
    record = manifest(entry(), entry(path=("model", 1, True, None, 2.5), sharding=None))
    parsed = parse_shard(memoryview(shard_of(record)))
    assert parsed.manifest == record
    assert type(parsed.manifest.tensors[1].path[2]) is bool
    assert bytes(parsed.objects) == b"objects"
    assert parsed.payload.nbytes == 128


def test_the_layout_of_the_header_is_frozen() -> None:
    packed = Header(64, 100, 192, 7, 128, 448).pack()
    assert packed.hex() == (
        "4846534841524431" + "0100000000000000" + "4000000000000000" + "6400000000000000"
        "c000000000000000" + "0700000000000000" + "8000000000000000" + "c001000000000000"
    )


def test_equal_manifests_have_equal_digests() -> None:
    first, second = encode_manifest(manifest(entry())), encode_manifest(manifest(entry()))
    assert digest_of(first) == digest_of(second)
    assert digest_of(first) != digest_of(encode_manifest(manifest(entry(lazy=False))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": ()}, "without a path"),
        ({"dtype": "object"}, "dtype 'object'"),
        ({"shape": (-3, -3)}, "shape"),
        ({"shape": (1,) * 65, "size_bytes": 4}, "shape"),
        ({"size_bytes": 35}, "expected 36"),
        ({"offset": 1}, "offset 1"),
        ({"offset": -64}, "offset -64"),
        ({"stride": (1, 2)}, "stride"),
        ({"sharding": Sharding(global_shape=(7,), global_offset=(0,), placements=("shard:0",), mesh_index=0)}, "dim"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        entry(**changes)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (lambda: manifest(entry(offset=128)), "behind the payload"),
        (lambda: manifest(entry(path=("other", "x"))), "belongs to none"),
        (lambda: manifest(entry(), entry()), "the same path"),
        (lambda: manifest(entry(sharding=msgspec.structs.replace(SHARDING, mesh_index=1))), "mesh 1 of 1"),
        (lambda: manifest(entry(sharding=msgspec.structs.replace(SHARDING, placements=()))), "0 placements"),
        (lambda: msgspec.structs.replace(manifest(), version=9), "version 9"),
        (lambda: Mesh(device_type="cpu", shape=(3,), dim_names=None, ranks=(0, 1)), "cannot have 2 ranks"),
        (lambda: Mesh(device_type="cpu", shape=(2,), dim_names=("a", "b"), ranks=(0, 1)), "2 names"),
        (lambda: msgspec.structs.replace(SHARDING, global_offset=(-1, 0)), "negative"),
        (lambda: msgspec.structs.replace(SHARDING, global_offset=(0,)), "global offset"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(record: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        assert record() is None  # type: ignore[operator]  # a lambda of the list above


def test_a_payload_of_another_length_than_the_manifest_tells_is_refused() -> None:
    shard = shard_of(manifest(entry()))
    encoded = encode_manifest(manifest(entry()))
    smaller = plan_header(len(encoded), 128, 64).pack()
    with pytest.raises(MalformedShardError, match="the manifest tells 128"):
        parse_shard(memoryview(smaller + bytes(shard[HEADER_BYTES:-64])))


@pytest.mark.parametrize(
    "changes",
    [
        {"manifest_offset": 128},
        {"manifest_bytes": 1 << 40},
        {"objects_offset": 64},
        {"objects_bytes": 129},
        {"objects_capacity_bytes": 1 << 62},
        {"objects_capacity_bytes": 1 << 20},
        {"objects_capacity_bytes": 65},
        {"shard_bytes": 64},
    ],
)
def test_a_header_whose_parts_do_not_fit_is_refused(changes: dict[str, int]) -> None:
    shard = shard_of(manifest(entry()))
    header = parse_shard(memoryview(shard)).header
    shard[:HEADER_BYTES] = header._replace(**changes).pack()
    with pytest.raises(MalformedShardError, match=r"do not fit|the header tells"):
        parse_shard(memoryview(shard))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_politely(noise: bytes) -> None:
    with pytest.raises(MalformedShardError):
        parse_shard(memoryview(noise))


@given(st.integers(0, 447), st.binary(min_size=1, max_size=9))
def test_damage_is_refused_or_leaves_a_checked_shard(position: int, damage: bytes) -> None:
    shard = shard_of(manifest(entry()))
    position %= len(shard)
    shard[position : position + len(damage)] = damage[: len(shard) - position]
    try:
        parsed: ParsedShard = parse_shard(memoryview(shard))
    except MalformedShardError:
        return
    for tensor in parsed.manifest.tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.size_bytes <= parsed.payload.nbytes


@given(st.integers(0, 447))
def test_a_shard_cut_short_is_refused(length: int) -> None:
    shard = shard_of(manifest(entry()))
    with pytest.raises(MalformedShardError):
        parse_shard(memoryview(shard)[: length % len(shard)])


@given(st.lists(st.integers(0, 3), max_size=3), st.lists(st.integers(0, 9), max_size=3))
def test_dense_is_what_visits_each_place_once(shape: list[int], stride: list[int]) -> None:
    sizes, steps = tuple(shape), tuple(stride)
    if len(sizes) != len(steps):
        assert not is_dense(sizes, steps)
        return
    visited = sorted(
        sum(index * step for index, step in zip(place, steps, strict=True))
        for place in itertools.product(*map(range, sizes))
    )
    if is_dense(sizes, steps):
        assert visited == list(range(len(visited)))
    elif visited:
        assert visited != list(range(len(visited)))


def test_small_words() -> None:
    assert align(0) == 0
    assert align(1) == align(64) == ALIGN_BYTES
    assert show_path(("optimizer", "state", 0, "step")) == "optimizer/state/0/step"
    assert set(ITEM_BYTES.values()) <= {1, 2, 4, 8, 16}
