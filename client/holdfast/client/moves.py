"""Thousands of small copies within one GPU's memory as one launch.

A kernel of our own, that the driver compiles for the GPU there is when it is first needed: neither a compiler nor a
library is. It works off a table of addresses. Why not torch's copies of lists, or a CUDA graph of them:
`docs/adr/0024-own-gather-kernel.md`. Where there is no such driver (AMD), or it refuses, `Moves.of` gives None.

Not here: whether the memory behind an address is still there. Who launches looks first.
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

log = logging.getLogger("holdfast")

ROW_BYTES_MAX = 64 << 10  # what one block of threads moves: enough blocks for a whole GPU from a few MiB on
_THREADS = 256
_ENTRY = b"holdfast_move"

# One block per row (from, to, bytes) of the table. 16 bytes a thread where both addresses allow it, else 4, else 1;
# what is left over at the end goes byte by byte.
_PROGRAM = b"""
.version 7.0
.target sm_70
.address_size 64

.visible .entry holdfast_move(.param .u64 table)
{
    .reg .pred %done;
    .reg .b16  %byte;
    .reg .b32  %row, %me, %w<4>;
    .reg .b64  %at, %from, %to, %bytes, %end, %mine, %off, %a, %b, %odd;

    ld.param.u64       %at, [table];
    cvta.to.global.u64 %at, %at;
    mov.u32            %row, %ctaid.x;
    mad.wide.u32       %at, %row, 24, %at;
    ld.global.u64      %from, [%at];
    ld.global.u64      %to, [%at+8];
    ld.global.u64      %bytes, [%at+16];
    cvta.to.global.u64 %from, %from;
    cvta.to.global.u64 %to, %to;
    mov.u32            %me, %tid.x;
    cvt.u64.u32        %mine, %me;
    mov.u64            %end, 0;
    or.b64             %odd, %from, %to;
    and.b64            %a, %odd, 15;
    setp.ne.u64        %done, %a, 0;
    @%done bra         FOURS;

    and.b64            %end, %bytes, -16;
    shl.b64            %off, %mine, 4;
SIXTEEN:
    setp.ge.u64        %done, %off, %end;
    @%done bra         REST;
    add.u64            %a, %from, %off;
    add.u64            %b, %to, %off;
    ld.global.v4.u32   {%w0, %w1, %w2, %w3}, [%a];
    st.global.v4.u32   [%b], {%w0, %w1, %w2, %w3};
    add.u64            %off, %off, 4096;
    bra                SIXTEEN;

FOURS:
    and.b64            %a, %odd, 3;
    setp.ne.u64        %done, %a, 0;
    @%done bra         REST;
    and.b64            %end, %bytes, -4;
    shl.b64            %off, %mine, 2;
FOUR:
    setp.ge.u64        %done, %off, %end;
    @%done bra         REST;
    add.u64            %a, %from, %off;
    add.u64            %b, %to, %off;
    ld.global.u32      %w0, [%a];
    st.global.u32      [%b], %w0;
    add.u64            %off, %off, 1024;
    bra                FOUR;

REST:
    add.u64            %off, %end, %mine;
ONE:
    setp.ge.u64        %done, %off, %bytes;
    @%done bra         OUT;
    add.u64            %a, %from, %off;
    add.u64            %b, %to, %off;
    ld.global.u8       %byte, [%a];
    st.global.u8       [%b], %byte;
    add.u64            %off, %off, 256;
    bra                ONE;
OUT:
    ret;
}
"""


class Moves:
    """A table of copies within one GPU's memory. Use `of`."""

    def __init__(self, function: ctypes.c_void_p, table: torch.Tensor) -> None:
        self._function, self._table = function, table
        self._device, self._row_count = table.device, table.shape[0]
        self._address = ctypes.c_uint64(table.data_ptr())
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._address))

    @classmethod
    def of(
        cls, sources: Sequence[int], targets: Sequence[int], sizes_bytes: Sequence[int], device: torch.device
    ) -> "Moves | None":
        """Plan one copy per source: from its address to a target's, so many bytes. None where a kernel can't be had.

        The table is on the GPU for whatever the current stream does from now on.
        """
        function = _function_of(device.index)
        if function is None:
            return None
        rows = torch.from_numpy(_rows(sources, targets, sizes_bytes))
        return cls(function, rows.pin_memory().to(device, non_blocking=True))

    def launch(self) -> bool:
        """Have the current stream move everything; the host does not wait. False: the driver refused, nothing moves."""
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        driver = _driver()
        assert driver is not None
        code = driver.cuLaunchKernel(
            self._function, self._row_count, 1, 1, _THREADS, 1, 1, 0, stream, self._arguments, None
        )
        if code != 0:
            log.warning("CUDA does not launch the gathering kernel (error %d): small tensors are copied slower", code)
        return bool(code == 0)


def _rows(
    sources: Sequence[int], targets: Sequence[int], sizes_bytes: Sequence[int]
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Rows of (from, to, bytes), none longer than `ROW_BYTES_MAX`."""
    whole = np.array([sources, targets, sizes_bytes], dtype=np.int64)
    counts = -(-whole[2] // ROW_BYTES_MAX)
    owner = np.repeat(np.arange(counts.size), counts)
    within = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = whole[:, owner].T.copy()
    rows[:, :2] += within[:, None] * ROW_BYTES_MAX
    rows[:, 2] = np.minimum(rows[:, 2] - within * ROW_BYTES_MAX, ROW_BYTES_MAX)
    return rows


@cache
def _driver() -> ctypes.CDLL | None:
    """The library that torch has loaded already, if it is NVIDIA's."""
    try:
        return ctypes.CDLL("libcuda.so.1") if torch.version.cuda else None
    except OSError:
        return None


@cache
def _function_of(device_index: int) -> ctypes.c_void_p | None:
    """The kernel, compiled for a GPU and kept for good; None, said once, if the driver will not."""
    driver = _driver()
    if driver is None:
        return None
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device_index):
        torch.cuda.Event().record()  # type: ignore[no-untyped-call]  # any such call makes the context this thread's
        code = driver.cuModuleLoadData(ctypes.byref(module), _PROGRAM)
        code = code or driver.cuModuleGetFunction(ctypes.byref(function), module, _ENTRY)
    if code != 0:
        log.warning("CUDA does not take the gathering kernel (error %d): small tensors are copied slower", code)
        return None
    return function
