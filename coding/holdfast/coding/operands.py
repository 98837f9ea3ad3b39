"""What an engine's ``matmul`` accepts, checked in one place, and refused whole with the numbers.

The checks cost some microseconds per buffer. The native engine makes the same ones in C.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from holdfast.coding.errors import BufferMismatchError
from holdfast.coding.params import MAX_CODE_LENGTH

if TYPE_CHECKING:
    from typing_extensions import Buffer as AnyBuffer

    # numpy's types say that arrays are buffers from Python 3.12 on; at run time they always are.
    Buffer: TypeAlias = AnyBuffer | npt.NDArray[np.generic]
else:
    Buffer = object  # the protocol has a name in the standard library from Python 3.12 on

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Operands:
    """Checked arguments: flat uint8 views of the caller's memory, nothing copied."""

    coefficients: Bytes  # shape (len(destinations), len(sources)), C-contiguous
    sources: list[Bytes]
    destinations: list[Bytes]  # writable, disjoint from each other and from all sources
    chunk_bytes: int  # length of every buffer


def check_operands(coefficients: Bytes, sources: Sequence[Buffer], destinations: Sequence[Buffer]) -> Operands:
    """Check the arguments of one product and view its buffers as bytes.

    Raises:
        BufferMismatchError: Counts, lengths, writability, contiguity or overlap are wrong.
    """
    source_views = [bytes_of(b, f"source {i}") for i, b in enumerate(sources)]
    destination_views = [bytes_of(b, f"destination {i}") for i, b in enumerate(destinations)]
    _check_counts(coefficients, len(source_views), len(destination_views))
    chunk_bytes = _common_length(source_views, destination_views)
    for index, view in enumerate(destination_views):
        if not view.flags.writeable:
            raise BufferMismatchError(f"destination {index} ({view.size} bytes) is read-only; pass writable memory")
    if chunk_bytes > 0:
        _check_disjoint(source_views, destination_views, chunk_bytes)
    return Operands(np.ascontiguousarray(coefficients), source_views, destination_views, chunk_bytes)


def bytes_of(buffer: Buffer, name: str) -> Bytes:
    """A flat, C-contiguous buffer as uint8, without a copy; ``name`` says in errors which one.

    Raises:
        BufferMismatchError: Not a buffer, or not contiguous.
    """
    try:
        view = memoryview(cast("AnyBuffer", buffer))
    except (TypeError, ValueError, BufferError) as error:
        raise BufferMismatchError(f"{name} must be a buffer of bytes, got {type(buffer).__name__}: {error}") from error
    if not view.c_contiguous:
        raise BufferMismatchError(
            f"{name} must be C-contiguous, got shape {view.shape} with strides {view.strides}; "
            "pass a contiguous view or a copy"
        )
    if view.nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer(view, dtype=np.uint8)


def address_of(view: Bytes) -> int:
    """Where the bytes are; valid while the caller keeps the buffer."""
    return int(view.__array_interface__["data"][0])


def _check_counts(coefficients: Bytes, source_count: int, destination_count: int) -> None:
    if coefficients.dtype != np.uint8 or coefficients.ndim != 2:
        raise BufferMismatchError(
            "coefficients must be a 2-dimensional array of uint8, got "
            f"{coefficients.ndim} dimensions of {coefficients.dtype}"
        )
    if coefficients.shape != (destination_count, source_count):
        raise BufferMismatchError(
            f"coefficients of shape {coefficients.shape} need {coefficients.shape[0]} destinations "
            f"and {coefficients.shape[1]} sources, got {destination_count} and {source_count}"
        )
    if max(source_count, destination_count) > MAX_CODE_LENGTH:
        raise BufferMismatchError(
            f"at most {MAX_CODE_LENGTH} sources and destinations, got {source_count} and {destination_count}"
        )


def _common_length(sources: list[Bytes], destinations: list[Bytes]) -> int:
    lengths = [("source", i, view.size) for i, view in enumerate(sources)]
    lengths += [("destination", i, view.size) for i, view in enumerate(destinations)]
    if not lengths:
        return 0
    expected_bytes = lengths[0][2]
    for role, index, size_bytes in lengths:
        if size_bytes != expected_bytes:
            raise BufferMismatchError(
                f"all buffers must have the same length: {lengths[0][0]} 0 has {expected_bytes} "
                f"bytes, {role} {index} has {size_bytes}"
            )
    return expected_bytes


def _check_disjoint(sources: list[Bytes], destinations: list[Bytes], chunk_bytes: int) -> None:
    """Sorted by address, no two neighbours may overlap unless both are sources."""
    spans = [(address_of(view), f"source {i}", False) for i, view in enumerate(sources)]
    spans += [(address_of(view), f"destination {i}", True) for i, view in enumerate(destinations)]
    spans.sort()
    # All spans have one length, so only the last one before in address order can be the rival; but
    # two sources may overlap, so the last of any kind and the last written one are remembered.
    last_any: tuple[int, str] | None = None
    last_written: tuple[int, str] | None = None
    for start, label, is_written in spans:
        rival = last_any if is_written else last_written
        if rival is not None and rival[0] + chunk_bytes > start:
            raise BufferMismatchError(
                f"{label} overlaps {rival[1]} in {rival[0] + chunk_bytes - start} of "
                f"{chunk_bytes} bytes; a destination must share no byte with any other buffer"
            )
        last_any = (start, label)
        if is_written:
            last_written = last_any
