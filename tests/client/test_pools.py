"""Pools are cut completely, disjointly and evenly, whatever lies in them; witnesses are of what others hold."""

from itertools import pairwise

import torch
from holdfast.client.lanes import piece
from holdfast.client.manifest import ALIGN_BYTES, share_of
from holdfast.client.places import Kind
from holdfast.client.pools import WITNESSES_MAX, Laying, Pools
from hypothesis import given
from hypothesis import strategies as st

# A tensor: its kind, whether only some roles have it, its bytes.
TENSORS = st.lists(
    st.tuples(st.sampled_from([Kind.PACKED, Kind.STRAIGHT]), st.booleans(), st.integers(1, 700)),
    min_size=1,
    max_size=12,
).map(sorted)


@given(st.integers(0, 1000), st.integers(1, 40))
def test_shares_are_disjoint_complete_and_even_to_a_line(lines: int, count: int) -> None:
    shares = [share_of(lines * ALIGN_BYTES, count, index) for index in range(count)]
    assert shares[0][0] == 0
    assert shares[-1][1] == lines * ALIGN_BYTES
    assert all(before[1] == after[0] for before, after in pairwise(shares))
    sizes = {stop - start for start, stop in shares}
    assert max(sizes) - min(sizes) <= ALIGN_BYTES
    assert all(edge % ALIGN_BYTES == 0 for share in shares for edge in share)


def laid_out(
    tensors: list[tuple[Kind, bool, int]], *, role: int, count: int
) -> tuple[Pools, list[tuple[int, int]], int]:
    """Pools of one role, the places of the tensors that it has, and the payload's bytes."""
    laying = Laying(role)
    few = tuple(range(2))
    mine = [
        (kind, few if some else tuple(range(count)), size) for kind, some, size in tensors if not some or role in few
    ]
    places = [laying.add(kind, roles, size) for kind, roles, size in mine]
    offset = 0
    for kind in Kind:
        offset = laying.settle(kind, offset)
        if kind is Kind.PACKED:
            offset = laying.settle_witnesses(offset)
    return laying.pools(), places, offset


@given(TENSORS, st.integers(3, 5))
def test_each_byte_of_a_tensor_is_copied_by_one_role_to_a_place_of_its_own(
    tensors: list[tuple[Kind, bool, int]], count: int
) -> None:
    contents = [torch.arange(size, dtype=torch.int64).to(torch.uint8) for _, _, size in tensors]
    copied = [torch.zeros(size, dtype=torch.int64) for _, _, size in tensors]
    for role in range(count):
        pools, places, payload_bytes = laid_out(tensors, role=role, count=count)
        taken = torch.zeros(payload_bytes, dtype=torch.int64)
        here = [index for index, (_, some, _) in enumerate(tensors) if not some or role < 2]
        for index, (number, place) in zip(here, places, strict=True):
            part, witnesses = pools.parts_of(piece(contents[index], place, len(contents[index])), number)
            assert part.raw is not None
            start = part.raw.data_ptr() - contents[index].data_ptr()
            copied[index][start : start + part.size_bytes] += 1
            assert len(part.raw) == part.size_bytes
            for each in (part, *witnesses):
                assert each.offset % ALIGN_BYTES == 0
                taken[each.offset : each.offset + each.size_bytes] += 1
        assert bool((taken <= 1).all())
        assert len(pools.witnesses) <= WITNESSES_MAX
        for witness in pools.witnesses:
            start, stop = pools.pools[witness.pool].share
            assert not start <= witness.start < stop
    assert all(bool((times == 1).all()) for times in copied)


def test_every_line_that_is_witnessed_is_watched_by_all_who_do_not_hold_it() -> None:
    tensors = [(Kind.STRAIGHT, False, 100_000), (Kind.STRAIGHT, False, 30)]
    seen = [{w.start for w in laid_out(tensors, role=role, count=3)[0].witnesses} for role in range(3)]
    for start in set().union(*seen):
        assert sum(start in mine for mine in seen) == 2
    assert len(set().union(*seen)) >= 8
