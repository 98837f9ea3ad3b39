"""One rank's part of a ``dcp.save`` as a shard: what torch's planner gave it to write, in the shard's own format.

A tensor's path is (DCP_NAME, flat name, offset in the global tensor as text): a planner may give a rank many parts of
one tensor. What is no tensor stays the archive that the planner made of it.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from holdfast.client.catalogue import DCP_NAME
from holdfast.client.dcp_archive import check_archive
from holdfast.client.flatten import check_tensor, dtype_name, save_objects
from holdfast.client.manifest import (
    FORMAT_VERSION,
    ITEM_BYTES,
    OBJECTS_BYTES_MAX,
    Manifest,
    Mesh,
    Path,
    Sharding,
    TensorEntry,
    align,
    encode_manifest,
    plan_header,
)
from holdfast.client.state_errors import StateError
from holdfast.client.tensor_bytes import copy_out, raw_bytes
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

OBJECTS_CAPACITY_BYTES_MIN = 32 << 10  # plain values that grow a little should not cost a new plan


class Parcel:
    """What one rank writes at one save. Tensors are held by reference until `write`.

    Attributes:
        shard_bytes: its length as a shard.
        sizes: bytes of each item of the plan, in its order.
    """

    def __init__(self, plan: SavePlan, planner: SavePlanner, *, rank: int, allow_pickle: bool) -> None:
        """Ask the planner for every item's data.

        Raises:
            StateError: an item has no plain bytes, or would not be readable.
        """
        self.sizes: list[int] = []
        self._sources: list[tuple[int, torch.Tensor]] = []
        archives: dict[str, bytes] = {}
        entries: list[TensorEntry] = []
        end = 0
        for item in plan.items:
            data = planner.resolve_data(item)
            if item.type is WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                archives[item.index.fqn] = data.getvalue()
                check_archive(item.index.fqn, archives[item.index.fqn], allow_pickle=allow_pickle)
                self.sizes.append(len(archives[item.index.fqn]))
                continue
            assert isinstance(data, torch.Tensor)
            entry = _entry(item, data, end)
            entries.append(entry)
            self._sources.append((end, data.detach()))
            self.sizes.append(entry.size_bytes)
            end += align(entry.size_bytes)
        self._objects = save_objects(
            {"objects": {DCP_NAME: {"archives": archives, "paths": _paths(plan.planner_data)}}, "rng": {}}
        )
        manifest = Manifest(
            version=FORMAT_VERSION,
            names=(DCP_NAME,),
            tensors=tuple(entries),
            meshes=(Mesh(device_type="cpu", shape=(), dim_names=None, ranks=(rank,)),),
            payload_bytes=end,
            objects_capacity_bytes=_capacity(len(self._objects)),
        )
        self._manifest = encode_manifest(manifest)
        self._header = plan_header(len(self._manifest), manifest.objects_capacity_bytes, end)
        self.shard_bytes = self._header.shard_bytes

    # The staging thread asks a capture three things; a parcel does all at once, from memory that nobody changes.

    def start(self, target: memoryview) -> None:
        """Write the whole shard."""
        self.write(target)

    def finish(self) -> None:
        """Nothing is left to do."""

    def settle(self) -> None:
        """Nothing goes on in the background."""

    def write(self, target: memoryview) -> None:
        """Write the whole shard; every byte of `target`, which has its length, is overwritten."""
        assert target.nbytes == self.shard_bytes
        shard = np.frombuffer(target, dtype=np.uint8)
        header = self._header._replace(objects_bytes=len(self._objects))
        head = header.pack() + self._manifest
        head += bytes(header.objects_offset - len(head)) + self._objects
        shard[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        shard[len(head) : header.payload_offset] = 0
        payload = shard[header.payload_offset :]
        end = 0
        for offset, tensor in self._sources:
            size_bytes = tensor.numel() * tensor.element_size()
            end = offset + align(size_bytes)
            copy_out(tensor, raw_bytes(tensor), payload[offset : offset + size_bytes])
            payload[offset + size_bytes : end] = 0
        payload[end:] = 0


def _entry(item: WriteItem, tensor: torch.Tensor, offset: int) -> TensorEntry:
    described = item.tensor_data
    assert described is not None
    chunk = described.chunk
    path: Path = (DCP_NAME, item.index.fqn, ",".join(map(str, chunk.offsets)))
    check_tensor(path, tensor)
    if tuple(tensor.shape) != tuple(chunk.sizes):
        raise StateError(f"{item.index.fqn}: expected a part of shape {list(chunk.sizes)}, found {list(tensor.shape)}")
    dtype = dtype_name(tensor.dtype)
    return TensorEntry(
        path=path,
        dtype=dtype,
        shape=tuple(tensor.shape),
        stride=None,
        offset=offset,
        size_bytes=math.prod(tensor.shape) * ITEM_BYTES[dtype],
        lazy=False,
        sharding=Sharding(tuple(described.size), tuple(chunk.offsets), placements=(), mesh_index=0),
    )


def _paths(planner_data: Any) -> dict[str, list[str | int]]:  # noqa: ANN401  # a planner's own affair
    """The keys of each flat name, where the planner tells them as torch's own does."""
    if not isinstance(planner_data, Mapping):
        return {}
    return {str(name): [*path] for name, path in planner_data.items() if isinstance(path, tuple)}


def _capacity(objects_bytes: int) -> int:
    wanted_bytes = max(OBJECTS_CAPACITY_BYTES_MIN, objects_bytes + objects_bytes // 4)
    capacity_bytes = 1 << (wanted_bytes - 1).bit_length()
    if capacity_bytes > OBJECTS_BYTES_MAX:
        raise StateError(
            f"values that are no tensors take {objects_bytes} bytes on this rank, at most {OBJECTS_BYTES_MAX // 2} are "
            "admitted: keep large data in tensors"
        )
    return capacity_bytes
