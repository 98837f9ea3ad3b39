"""A good stripe comes out right for every loss, by the engine and by the witness; a bad one does not."""

from itertools import combinations

import numpy as np
import pytest
from holdfast.coding import CodeParams, chunk_digest, parity_matrix, select_engine
from holdfast.daemon.core.actions import DrillStripe
from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.shell.drilling import drill
from holdfast.protocol.ids import SnapshotId

ENGINE = select_engine("numpy")
SIZE = 512


def stripe(params: CodeParams) -> dict[int, memoryview]:
    data = np.random.default_rng(3).integers(0, 256, (params.data_count, SIZE), dtype=np.uint8)
    parity = [bytearray(SIZE) for _ in range(params.parity_count)]
    ENGINE.matmul(parity_matrix(params), list(data), parity)
    return dict(enumerate([*(memoryview(bytearray(row.tobytes())) for row in data), *map(memoryview, parity)]))


def order(params: CodeParams, chunks: dict[int, memoryview], absent: tuple[int, ...] = ()) -> DrillStripe:
    others = [p for p in range(params.total_count) if p not in absent]
    patterns = [tuple(sorted((*absent, *lost))) for lost in combinations(others, params.parity_count - len(absent))]
    return DrillStripe(
        memory=Memory("a", 0, 1),
        snapshot=SnapshotId(1, 1),
        stripe=0,
        sources=(),
        own=(params.data_count, Resting("parity", 0), 0),
        zero_positions=(),
        digests=tuple((p, chunk_digest(chunks[p])) for p in range(params.data_count)),
        patterns=tuple(patterns),
        columns=(0, 100, SIZE - 1),
    )


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (2, 2), (6, 2), (5, 3)])
def test_a_good_stripe_comes_out_right_for_every_loss(k: int, m: int) -> None:
    params = CodeParams(k, m)
    chunks = stripe(params)
    wrong, coded_ns = drill(ENGINE, params, order(params, chunks), chunks, own_good=True)
    assert wrong == ()
    assert coded_ns > 0


def test_an_absent_member_is_lost_in_every_pattern_and_its_data_judged_by_digest() -> None:
    params = CodeParams(4, 2)
    chunks = stripe(params)
    asked = order(params, chunks, absent=(1,))
    del chunks[1]
    assert drill(ENGINE, params, asked, chunks, own_good=True)[0] == ()
    chunks[5] = memoryview(bytes(SIZE))
    wrong, _ = drill(ENGINE, params, asked, chunks, own_good=True)
    assert any("position 1 is not rebuilt as it was" in text for text in wrong)


@pytest.mark.parametrize("position", range(5))
def test_one_wrong_byte_anywhere_is_seen(position: int) -> None:
    params = CodeParams(3, 2)
    chunks = stripe(params)
    asked = order(params, chunks)
    chunks[position][100] ^= 1
    wrong, _ = drill(ENGINE, params, asked, chunks, own_good=True)
    assert any("not rebuilt as it was" in text for text in wrong)
    assert any("the witness says of column 100" in text for text in wrong)


def test_a_chunk_of_ones_own_that_fails_its_digest_is_no_proof() -> None:
    params = CodeParams(2, 1)
    chunks = stripe(params)
    assert drill(ENGINE, params, order(params, chunks), chunks, own_good=False)[0] != ()
