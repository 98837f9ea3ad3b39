"""The shard's format: what a rank's bytes say about themselves.

Pure Python: no torch, no memory of its own.

A shard is, in this order and each part on a 64-byte boundary:

  * the header, 64 bytes, little-endian: magic, version, where manifest and objects lie, the whole
    length;
  * the manifest, msgpack of ``Manifest``: one entry per tensor, with its place in the payload;
  * the objects, room of a fixed capacity for what is no tensor (an archive that ``torch.save``
    wrote);
  * the payload: the tensors' bytes in C order, first those copied at once, then those copied in the
    background.

Offsets in the manifest count from the payload's start, so the manifest does not depend on its own
length. Parsing trusts nothing: whatever bytes come in, the answer is a checked ``ParsedShard`` or
``MalformedShardError``.

A *pool* is what several ranks have alike: tensors laid end to end as in a payload, and cut into equal *shares*, one in
the payload of each of these ranks. An entry that lies in a pool has its place there. A *witness* is a line of a pool
that is not in this rank's share, as this rank has it.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
from holdfast.client.state_errors import MalformedShardError

MAGIC = b"HFSHARD1"
FORMAT_VERSION = 1
FORMAT_VERSION_POOLED = 2  # of a shard with pools; others stay readable by releases that know none
ALIGN_BYTES = 64  # a cache line: no two tensors share one, and every dtype is aligned
HEADER = struct.Struct("<8sIIQQQQQQ")
HEADER_BYTES = HEADER.size
MANIFEST_BYTES_MAX = 256 << 20  # over a million tensors; bounds what a hostile header can make us decode
OBJECTS_BYTES_MAX = 1 << 30  # plain Python objects beyond this belong into tensors
TENSOR_COUNT_MAX = 1 << 20
TENSOR_DIMS_MAX = 64  # torch's own limit
SHARD_BYTES_MAX = 1 << 48

assert HEADER_BYTES == ALIGN_BYTES

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

PathKey = str | int | float | bool | None
Path = tuple[PathKey, ...]


class Mesh(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device mesh as the tensors laid over it knew it; ``ranks`` is in C order of ``shape``."""

    device_type: str
    shape: tuple[int, ...]
    dim_names: tuple[str, ...] | None
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape) or math.prod(self.shape) != len(self.ranks):
            raise ValueError(f"a mesh of shape {self.shape} cannot have {len(self.ranks)} ranks")
        if self.dim_names is not None and len(self.dim_names) != len(self.shape):
            raise ValueError(f"{len(self.shape)} mesh dimensions but {len(self.dim_names)} names")


class Sharding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a local tensor is a part of a global one.

    ``placements`` has one text per mesh dimension: ``replicate``, ``shard:DIM``,
    ``strided_shard:DIM:FACTOR`` or ``partial:OP``. ``global_offset`` is where the local part begins
    in the global tensor (zeros where that has no single answer).
    """

    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    placements: tuple[str, ...]
    mesh_index: int

    def __post_init__(self) -> None:
        if len(self.global_shape) != len(self.global_offset):
            raise ValueError(f"global shape {self.global_shape}, global offset {self.global_offset}")
        if min((*self.global_shape, *self.global_offset, self.mesh_index), default=0) < 0:
            raise ValueError("a negative number in a sharding")


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One tensor of the state.

    Entries may share a place: equal views of one memory are stored once.
    ``shape`` is local, in elements; ``stride`` is told only where the live tensor is dense but not
    in C order (the bytes always are); ``offset`` counts bytes from the payload's start, or from that of
    the ``pool`` in which it lies; ``lazy`` tells which copy made it.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int
    size_bytes: int
    lazy: bool
    sharding: Sharding | None
    pool: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a tensor without a path")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"{show_path(self.path)}: dtype {self.dtype!r} is not known")
        if len(self.shape) > TENSOR_DIMS_MAX or min(self.shape, default=0) < 0:
            raise ValueError(f"{show_path(self.path)}: shape {self.shape}")
        expected_bytes = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if self.size_bytes != expected_bytes:
            raise ValueError(
                f"{show_path(self.path)}: {self.size_bytes} bytes for {self.dtype} {self.shape}, "
                f"expected {expected_bytes}"
            )
        if self.offset < 0 or self.offset % ALIGN_BYTES:
            raise ValueError(f"{show_path(self.path)}: offset {self.offset}")
        if self.stride is not None and not is_dense(self.shape, self.stride):
            raise ValueError(f"{show_path(self.path)}: stride {self.stride} for shape {self.shape}")
        if self.sharding is not None and len(self.sharding.global_shape) != len(self.shape):
            raise ValueError(f"{show_path(self.path)}: local and global dimensions differ")


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that several roles have alike, and the share of them that lies here.

    ``roles`` ascend; ``index`` is this shard's among them; ``size_bytes`` is the whole pool's; ``offset`` is where the
    share begins in the payload.
    """

    roles: tuple[int, ...]
    index: int
    size_bytes: int
    offset: int

    def __post_init__(self) -> None:
        ascend = all(before < after for before, after in pairwise(self.roles))
        if len(self.roles) < 2 or not ascend or self.roles[0] < 0 or not 0 <= self.index < len(self.roles):
            raise ValueError(f"a pool of roles {self.roles}, of which this is number {self.index}")
        if min(self.size_bytes, self.offset) < 0 or self.size_bytes % ALIGN_BYTES or self.offset % ALIGN_BYTES:
            raise ValueError(f"a pool of {self.size_bytes} bytes at {self.offset}")

    @property
    def share(self) -> tuple[int, int]:
        """From where to where in the pool this shard's share goes."""
        return share_of(self.size_bytes, len(self.roles), self.index)

    @property
    def share_bytes(self) -> int:
        """How many bytes of the pool lie here."""
        start, stop = self.share
        return stop - start


class Witness(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``size_bytes`` of a pool from ``start`` on, as this rank has them; they lie at ``offset`` of the payload."""

    pool: int
    start: int
    size_bytes: int
    offset: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every tensor of one rank's state and its place; knows neither rank nor step.

    ``parameters`` names, for each optimizer, its parameters in the order in which its state numbers them.
    """

    version: int
    names: tuple[str, ...]
    tensors: tuple[TensorEntry, ...]
    meshes: tuple[Mesh, ...]
    payload_bytes: int
    objects_capacity_bytes: int
    parameters: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    pools: tuple[Pool, ...] = ()
    witnesses: tuple[Witness, ...] = ()

    def __post_init__(self) -> None:
        if self.version != version_of(self.pools):
            raise ValueError(f"manifest version {self.version} with {len(self.pools)} pools")
        if len(self.tensors) > TENSOR_COUNT_MAX:
            raise ValueError(f"{len(self.tensors)} tensors, at most {TENSOR_COUNT_MAX}")
        _check_pools(self)
        for entry in self.tensors:
            where = show_path(entry.path)
            if entry.pool is not None and entry.pool not in range(len(self.pools)):
                raise ValueError(f"{where}: pool {entry.pool} of {len(self.pools)}")
            room, room_bytes = "payload", self.payload_bytes
            if entry.pool is not None:
                room, room_bytes = f"pool {entry.pool}", self.pools[entry.pool].size_bytes
            if entry.offset + entry.size_bytes > room_bytes:
                raise ValueError(f"{where}: ends behind the {room} of {room_bytes} bytes")
            if entry.path[0] not in self.names:
                raise ValueError(f"{where}: belongs to none of {self.names}")
            if entry.sharding is not None:
                _check_mesh(where, entry.sharding, self.meshes)
        if len({entry.path for entry in self.tensors}) != len(self.tensors):
            raise ValueError("two tensors have the same path")


class Header(NamedTuple):
    """Where the parts of a shard lie, in bytes from its start."""

    manifest_offset: int
    manifest_bytes: int
    objects_offset: int
    objects_bytes: int
    objects_capacity_bytes: int
    shard_bytes: int
    version: int = FORMAT_VERSION

    @property
    def payload_offset(self) -> int:
        """Where the tensors begin."""
        return self.objects_offset + self.objects_capacity_bytes

    def pack(self) -> bytes:
        """The header's 64 bytes."""
        return HEADER.pack(MAGIC, self.version, 0, *self[:-1])


class ParsedShard(NamedTuple):
    """A checked view of a shard: ``objects`` and ``payload`` alias the memory that was parsed."""

    header: Header
    manifest: Manifest
    objects: memoryview
    payload: memoryview


def align(size_bytes: int) -> int:
    """``size_bytes`` rounded up to the next boundary."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def share_of(size_bytes: int, count: int, index: int) -> tuple[int, int]:
    """From where to where the share with this index goes, where ``size_bytes`` are cut for ``count`` roles.

    Cuts lie on boundaries. Shares are disjoint and make up the whole; no two differ by more than one line.
    """
    assert size_bytes % ALIGN_BYTES == 0
    assert 0 <= index < count
    lines = size_bytes // ALIGN_BYTES
    return lines * index // count * ALIGN_BYTES, lines * (index + 1) // count * ALIGN_BYTES


def version_of(pools: Sequence[Pool]) -> int:
    """The format of a shard with these pools."""
    return FORMAT_VERSION_POOLED if pools else FORMAT_VERSION


def show_path(path: Path) -> str:
    """A path as people read it: ``optimizer/state/0/exp_avg``."""
    return "/".join(str(key) for key in path)


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether these strides visit every element of one solid block exactly once."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as msgpack; equal manifests give equal bytes."""
    return msgspec.msgpack.encode(manifest)


def digest_of(manifest_bytes: bytes) -> str:
    """SHA-256 of an encoded manifest, in hex: equal digests mean interchangeable layouts."""
    return hashlib.sha256(manifest_bytes).hexdigest()


def plan_header(
    manifest_bytes: int, objects_capacity_bytes: int, payload_bytes: int, *, version: int = FORMAT_VERSION
) -> Header:
    """Place the parts of a shard one behind the other, with no objects in it yet."""
    objects_offset = align(HEADER_BYTES + manifest_bytes)
    shard_bytes = align(objects_offset + objects_capacity_bytes + payload_bytes)
    return Header(HEADER_BYTES, manifest_bytes, objects_offset, 0, objects_capacity_bytes, shard_bytes, version)


def parse_header(shard: memoryview, *, shard_bytes: int | None = None) -> Header:
    """Check the first 64 bytes against the length of ``shard``, or against ``shard_bytes`` where that is only its head.

    Raises:
        MalformedShardError: these are not a shard's first bytes, or its parts do not fit its
        length.
    """
    if shard.nbytes < HEADER_BYTES:
        raise MalformedShardError(f"{shard.nbytes} bytes are no shard: expected at least {HEADER_BYTES}")
    magic, version, reserved, *numbers = HEADER.unpack(shard[:HEADER_BYTES])
    if magic != MAGIC:
        raise MalformedShardError(f"expected a shard's magic {MAGIC!r}, found {magic!r}")
    if version not in {FORMAT_VERSION, FORMAT_VERSION_POOLED} or reserved:
        raise MalformedShardError(
            f"shard format {version}, this program reads {FORMAT_VERSION} and {FORMAT_VERSION_POOLED}: restore with "
            "the release that wrote it"
        )
    header = Header(*numbers)._replace(version=version)
    found_bytes = shard.nbytes if shard_bytes is None else shard_bytes
    if header.shard_bytes != found_bytes or header.shard_bytes > SHARD_BYTES_MAX:
        raise MalformedShardError(
            f"the header tells {header.shard_bytes} bytes, found {found_bytes}: the shard is cut short or padded"
        )
    in_order = (
        header.manifest_offset == HEADER_BYTES
        and header.manifest_bytes <= MANIFEST_BYTES_MAX
        and header.objects_offset == align(HEADER_BYTES + header.manifest_bytes)
        and header.objects_bytes <= header.objects_capacity_bytes <= OBJECTS_BYTES_MAX
        and header.objects_capacity_bytes % ALIGN_BYTES == 0
        and header.payload_offset <= header.shard_bytes
    )
    if not in_order:
        raise MalformedShardError(f"the parts of a shard of {found_bytes} bytes do not fit: {header}")
    return header


def parse_shard(shard: memoryview) -> ParsedShard:
    """Check a whole shard's structure; the bytes of tensors and objects are not looked at.

    Args:
        shard: Contiguous memory of exactly the shard's length; read, never kept beyond the result's
        views.

    Raises:
        MalformedShardError: with what was expected and found.
    """
    raw = shard.cast("B")
    header = parse_header(raw)
    manifest = parse_manifest(raw[header.manifest_offset : header.manifest_offset + header.manifest_bytes], header)
    objects = raw[header.objects_offset : header.objects_offset + header.objects_bytes]
    return ParsedShard(header, manifest, objects, raw[header.payload_offset :])


def parse_manifest(encoded: memoryview, header: Header) -> Manifest:
    """Check a shard's manifest against its header.

    Raises:
        MalformedShardError: with what was expected and found.
    """
    try:
        manifest = msgspec.msgpack.decode(encoded, type=Manifest)
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise MalformedShardError(f"the manifest cannot be read: {error}") from error
    if manifest.version != header.version:
        raise MalformedShardError(f"a manifest of format {manifest.version} behind a header of format {header.version}")
    if (
        align(header.payload_offset + manifest.payload_bytes) != header.shard_bytes
        or manifest.objects_capacity_bytes != header.objects_capacity_bytes
    ):
        raise MalformedShardError(
            f"the manifest tells {manifest.payload_bytes} bytes of tensors and room for "
            f"{manifest.objects_capacity_bytes} of objects, the header leaves "
            f"{header.shard_bytes - header.payload_offset} and {header.objects_capacity_bytes}"
        )
    return manifest


def _check_pools(manifest: Manifest) -> None:
    for number, pool in enumerate(manifest.pools):
        if pool.offset + pool.share_bytes > manifest.payload_bytes:
            raise ValueError(f"pool {number}: its share ends behind the payload of {manifest.payload_bytes} bytes")
    for witness in manifest.witnesses:
        if witness.pool not in range(len(manifest.pools)):
            raise ValueError(f"a witness of pool {witness.pool} of {len(manifest.pools)}")
        if min(witness.start, witness.offset, witness.size_bytes) < 0 or (
            witness.start + witness.size_bytes > manifest.pools[witness.pool].size_bytes
            or witness.offset + witness.size_bytes > manifest.payload_bytes
        ):
            raise ValueError(f"a witness lies nowhere: {witness}")


def _check_mesh(where: str, sharding: Sharding, meshes: tuple[Mesh, ...]) -> None:
    if sharding.mesh_index >= len(meshes):
        raise ValueError(f"{where}: mesh {sharding.mesh_index} of {len(meshes)}")
    if len(sharding.placements) != len(meshes[sharding.mesh_index].shape):
        raise ValueError(f"{where}: {len(sharding.placements)} placements on its mesh")
