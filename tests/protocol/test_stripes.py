"""The stripe map: every chunk has one place, no node has two chunks of a stripe, the load is even."""

from collections import Counter

import pytest
from holdfast.protocol.stripes import StripeMap
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def maps(draw: st.DrawFn, *, even: bool = False) -> StripeMap:
    """Groups of up to 9 members; ragged images, or even ones."""
    members = draw(st.integers(1, 9))
    parity = draw(st.integers(0, members - 1))
    if even:
        return StripeMap(parity, (draw(st.integers(0, 60)),) * members)
    return StripeMap(parity, tuple(draw(st.lists(st.integers(0, 40), min_size=members, max_size=members))))


@given(maps())
def test_chunk_and_stripe_are_a_bijection(stripes: StripeMap) -> None:
    seen = set()
    for member, count in enumerate(stripes.chunk_counts):
        for chunk in range(count):
            stripe = stripes.stripe_of(member, chunk)
            assert stripe < stripes.stripe_count
            assert stripes.chunk_at(stripe, member) == chunk
            assert (stripe, member) not in seen
            seen.add((stripe, member))
    named = {(s, member) for s in range(stripes.stripe_count) for _, member, _ in stripes.contributions(s)}
    assert named == seen


@given(maps())
def test_no_two_chunks_of_a_stripe_are_on_one_member(stripes: StripeMap) -> None:
    for stripe in range(stripes.stripe_count):
        holders = [*stripes.data_members(stripe), *stripes.parity_members(stripe)]
        assert sorted(holders) == list(range(stripes.member_count))
        for position, member, _ in stripes.contributions(stripe):
            assert stripes.data_members(stripe)[position] == member


@given(maps())
def test_parity_lies_dense_and_only_for_stripes_with_data(stripes: StripeMap) -> None:
    for member in range(stripes.member_count):
        held = list(stripes.parity_stripes(member))
        assert [stripes.parity_index(stripe, member) for stripe in held] == list(
            range(stripes.parity_chunk_count(member))
        )
        assert [stripes.parity_stripe(index, member) for index in range(len(held))] == held
        assert all(stripes.contributions(stripe) and member in stripes.parity_members(stripe) for stripe in held)
    held_by = Counter(s for member in range(stripes.member_count) for s in stripes.parity_stripes(member))
    real = {s for s in range(stripes.stripe_count) if stripes.contributions(s)}
    assert held_by == Counter(dict.fromkeys(real, stripes.parity_count) if stripes.parity_count else {})


@given(maps(even=True))
def test_even_images_make_an_even_load(stripes: StripeMap) -> None:
    counts = [stripes.parity_chunk_count(member) for member in range(stripes.member_count)]
    assert max(counts) - min(counts) <= stripes.parity_count
    share = stripes.chunk_counts[0] * stripes.parity_count / stripes.data_count
    assert all(abs(count - share) <= stripes.parity_count for count in counts)


def test_places_of_an_image_of_any_size_are_known_at_once() -> None:
    stripes = StripeMap(2, (5, 1 << 46, 1, 0))
    assert stripes.parity_chunk_count(3) == 1 << 46, "every stripe of member 1 that member 3 does not skip"
    last = stripes.parity_stripe(stripes.parity_chunk_count(0) - 1, 0)
    assert stripes.parity_index(last, 0) == stripes.parity_chunk_count(0) - 1
    with pytest.raises(KeyError, match="member 2 holds no parity of stripe 3"):
        stripes.parity_index(3, 2)
    with pytest.raises(IndexError, match="holds 0 parity chunks, not 0"):
        StripeMap(1, (0, 0)).parity_stripe(0, 1)


def test_a_small_map_is_as_drawn_in_the_design() -> None:
    stripes = StripeMap(parity_count=1, chunk_counts=(2, 2, 2))
    assert [stripes.parity_members(s) for s in range(3)] == [(0,), (1,), (2,)]
    assert [stripes.contributions(s) for s in range(3)] == [
        ((0, 1, 0), (1, 2, 0)),
        ((0, 0, 0), (1, 2, 1)),
        ((0, 0, 1), (1, 1, 1)),
    ]


def test_parity_needs_more_members_than_it_covers() -> None:
    with pytest.raises(ValueError, match="parity 2 needs at least 3 members in a group, found 2"):
        StripeMap(2, (1, 1))
