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
"""

import hashlib
import math
import struct
from typing import NamedTuple

import msgspec
from holdfast.client.state_errors import MalformedShardError

MAGIC = b"HFSHARD1"
FORMAT_VERSION = 1
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


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the state.

    Entries may share a place: equal views of one memory are stored once.
    ``shape`` is local, in elements; ``stride`` is told only where the live tensor is dense but not
    in C order (the bytes always are); ``offset`` counts bytes from the payload's start; ``lazy``
    tells which copy made it.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int
    size_bytes: int
    lazy: bool
    sharding: Sharding | None

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


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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

    def __post_init__(self) -> None:
        if self.version != FORMAT_VERSION:
            raise ValueError(f"manifest version {self.version}, this program reads {FORMAT_VERSION}")
        if len(self.tensors) > TENSOR_COUNT_MAX:
            raise ValueError(f"{len(self.tensors)} tensors, at most {TENSOR_COUNT_MAX}")
        for entry in self.tensors:
            where = show_path(entry.path)
            if entry.offset + entry.size_bytes > self.payload_bytes:
                raise ValueError(f"{where}: ends behind the payload of {self.payload_bytes} bytes")
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

    @property
    def payload_offset(self) -> int:
        """Where the tensors begin."""
        return self.objects_offset + self.objects_capacity_bytes

    def pack(self) -> bytes:
        """The header's 64 bytes."""
        return HEADER.pack(MAGIC, FORMAT_VERSION, 0, *self)


class ParsedShard(NamedTuple):
    """A checked view of a shard: ``objects`` and ``payload`` alias the memory that was parsed."""

    header: Header
    manifest: Manifest
    objects: memoryview
    payload: memoryview


def align(size_bytes: int) -> int:
    """``size_bytes`` rounded up to the next boundary."""
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


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


def plan_header(manifest_bytes: int, objects_capacity_bytes: int, payload_bytes: int) -> Header:
    """Place the parts of a shard one behind the other, with no objects in it yet."""
    objects_offset = align(HEADER_BYTES + manifest_bytes)
    shard_bytes = align(objects_offset + objects_capacity_bytes + payload_bytes)
    return Header(HEADER_BYTES, manifest_bytes, objects_offset, 0, objects_capacity_bytes, shard_bytes)


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
    if version != FORMAT_VERSION or reserved:
        raise MalformedShardError(
            f"shard format {version}, this program reads {FORMAT_VERSION}: restore with the release that wrote it"
        )
    header = Header(*numbers)
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


def _check_mesh(where: str, sharding: Sharding, meshes: tuple[Mesh, ...]) -> None:
    if sharding.mesh_index >= len(meshes):
        raise ValueError(f"{where}: mesh {sharding.mesh_index} of {len(meshes)}")
    if len(sharding.placements) != len(meshes[sharding.mesh_index].shape):
        raise ValueError(f"{where}: {len(sharding.placements)} placements on its mesh")
