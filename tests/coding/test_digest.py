import numpy as np
import pytest
from holdfast.coding import DIGEST_BYTES, Buffer, BufferMismatchError, RunningDigest, chunk_digest


@pytest.mark.parametrize(
    ("chunk", "digest"),
    [
        (b"", 0x2D06800538D394C2),
        (b"abc", 0x78AF5F94892F3950),
        (bytes(range(256)) * 16, 0xEB4B7C3707879151),
    ],
)
def test_digests_are_frozen(chunk: bytes, digest: int) -> None:
    """Stored and sent digests must stay valid over machines and versions."""
    assert chunk_digest(chunk) == digest < 2 ** (8 * DIGEST_BYTES)


def test_every_kind_of_buffer_gives_the_same_digest() -> None:
    content = bytes(range(200))
    array = np.frombuffer(content, dtype=np.uint8)
    kinds: list[Buffer] = [
        content,
        bytearray(content),
        memoryview(content),
        array,
        array.view(np.uint64),
    ]
    assert len({chunk_digest(kind) for kind in kinds}) == 1


def test_what_is_no_flat_buffer_is_refused() -> None:
    with pytest.raises(BufferMismatchError, match="chunk must be C-contiguous"):
        chunk_digest(np.zeros(8, dtype=np.uint8)[::2])
    with pytest.raises(BufferMismatchError, match="buffer of bytes, got str"):
        chunk_digest("text")  # type: ignore[arg-type]  # what an untyped caller might do


def test_pieces_give_the_digest_of_the_whole() -> None:
    content = bytes(range(256)) * 33
    running = RunningDigest()
    assert running.value == chunk_digest(b"")
    for start in range(0, len(content), 1000):
        running.add(memoryview(content)[start : start + 1000])
    assert running.value == chunk_digest(content)
    with pytest.raises(BufferMismatchError, match="piece must be"):
        running.add(np.zeros(8, dtype=np.uint8)[::2])
