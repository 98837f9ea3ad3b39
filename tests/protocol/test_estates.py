"""What absent members left, in a smaller code: every chunk of it, and every loss it is made for."""

from itertools import combinations

import pytest
from holdfast.coding import CodeParams, parity_matrix
from holdfast.coding.field import multiples_of
from holdfast.protocol.estates import Estate, Kind, Source, There, Wanted, estate_of, further_losses, mix
from holdfast.protocol.stripes import StripeMap

GROUPS = [
    (1, (3, 3, 3)),
    (1, (5, 0, 4, 7)),
    (1, (1, 1, 1, 1, 1)),
    (2, (4, 4, 4, 4)),
    (2, (9, 2, 0, 5, 7)),
    (2, (6, 6, 6, 6, 6, 6)),
    (3, (3, 1, 4, 1, 5, 9, 2)),
]


def all_chunks(stripes: StripeMap) -> dict[Source, int]:
    """Every chunk of the group, one byte each; parity as the code defines it."""
    held = {
        Source(member, "data", chunk): (37 * member + 101 * chunk + 7) % 256
        for member, count in enumerate(stripes.chunk_counts)
        for chunk in range(count)
    }
    rows = parity_matrix(CodeParams(stripes.data_count, stripes.parity_count)).tolist()
    for member in range(stripes.member_count):
        for stripe in stripes.parity_stripes(member):
            row = rows[stripes.parity_members(stripe).index(member)]
            total = 0
            for position, other, chunk in stripes.contributions(stripe):
                total ^= multiples_of(row[position])[held[Source(other, "data", chunk)]]
            held[Source(member, "parity", stripes.parity_index(stripe, member))] = total
    return held


def code_word(stripes: StripeMap, held: dict[Source, int], stripe: int, position: int) -> int:
    """The byte at a position of a stripe."""
    if position < stripes.data_count:
        member = stripes.data_members(stripe)[position]
        chunk = stripes.chunk_at(stripe, member)
        return 0 if chunk is None else held[Source(member, "data", chunk)]
    member = stripes.parity_members(stripe)[position - stripes.data_count]
    return held[Source(member, "parity", stripes.parity_index(stripe, member))]


def evaluated(recipe: dict[Source, int], held: dict[Source, int]) -> int:
    """The byte that a sum makes."""
    total = 0
    for source, factor in recipe.items():
        total ^= multiples_of(factor)[held[source]]
    return total


def estate_chunks(estate: Estate, held: dict[Source, int]) -> dict[Source, int]:
    """Every chunk of an estate, from the definition."""
    found = {}
    for member in estate.heirs:
        for chunk in range(estate.chunk_count(member)):
            total = 0
            for stripe, position, factor in estate.recipe(member, chunk):
                total ^= multiples_of(factor)[code_word(estate.stripes, held, stripe, position)]
            found[Source(member, "estate", chunk)] = total
    return found


def everything(stripes: StripeMap, members: set[int]) -> list[tuple[Source, Wanted]]:
    """All that some members hold, each as a sum of one."""
    found: list[tuple[Source, Wanted]] = []
    for member in members:
        for chunk in range(stripes.chunk_counts[member]):
            stripe = stripes.stripe_of(member, chunk)
            position = stripes.data_members(stripe).index(member)
            found.append((Source(member, "data", chunk), Wanted(stripe, position, 1)))
        for stripe in stripes.parity_stripes(member):
            row = stripes.parity_members(stripe).index(member)
            place = stripes.parity_index(stripe, member)
            found.append((Source(member, "parity", place), Wanted(stripe, stripes.data_count + row, 1)))
    return found


@pytest.mark.parametrize(("parity", "counts"), GROUPS)
def test_the_heirs_survive_as_many_losses_as_the_group_did(parity: int, counts: tuple[int, ...]) -> None:
    stripes = StripeMap(parity, counts)
    held = all_chunks(stripes)
    for absent_count in range(1, parity + 1):
        for absent in combinations(range(stripes.member_count), absent_count):
            estate = estate_of(stripes, absent)
            tolerated = further_losses(stripes, set(absent), [(estate, set(estate.heirs))])
            assert tolerated == max(estate.parity_count, parity - absent_count)
            chunks = held | estate_chunks(estate, held)
            for gone in combinations(estate.heirs, tolerated):
                live = set(estate.heirs) - set(gone)
                for source, wanted in everything(stripes, {*absent, *gone}):
                    recipe = mix(stripes, [wanted], There(live, estate, live))
                    assert recipe is not None, (absent, gone, source)
                    assert {part.member for part in recipe} <= live
                    assert evaluated(recipe, chunks) == held[source], (absent, gone, source)


@pytest.mark.parametrize(("parity", "counts"), GROUPS)
def test_one_loss_more_is_not_survived_by_what_counts_as_lost(parity: int, counts: tuple[int, ...]) -> None:
    stripes = StripeMap(parity, counts)
    estate = estate_of(stripes, (0,))
    for gone in combinations(estate.heirs, estate.parity_count + 1):
        live = set(estate.heirs) - set(gone)
        tolerated = further_losses(stripes, {0, *gone}, [(estate, live)])
        sources = everything(stripes, {0, *gone})
        found = [mix(stripes, [wanted], There(live, estate, live)) for _, wanted in sources]
        assert tolerated >= 0 or None in found or not any(counts[member] for member in live | set(gone))


@pytest.mark.parametrize(("parity", "counts"), GROUPS)
def test_an_estate_is_made_of_what_the_heirs_hold_and_of_the_estate_before_it(
    parity: int, counts: tuple[int, ...]
) -> None:
    stripes = StripeMap(parity, counts)
    if stripes.member_count < parity + 3:
        return
    held = all_chunks(stripes)
    first, second = estate_of(stripes, (1,)), estate_of(stripes, (1, 2))
    chunks = held | estate_chunks(first, held) | estate_chunks(second, held)
    old = {source: byte for source, byte in chunks.items() if source in held} | estate_chunks(first, held)
    live = set(second.heirs)
    for source, byte in estate_chunks(second, held).items():
        wanted = second.recipe(source.member, source.chunk)
        recipe = mix(stripes, wanted, There(live, first, live))
        assert recipe is not None
        assert evaluated(recipe, old) == byte


def test_the_chunks_that_were_left_are_dealt_evenly() -> None:
    estate = Estate(StripeMap(2, (60,) * 8), (3,))
    parts = [estate.chunk_count(member) for member in estate.heirs]
    assert sum(estate.inner.chunk_counts) == estate.left_count == 60 + StripeMap(2, (60,) * 8).parity_chunk_count(3)
    assert max(parts) - min(parts) <= 3
    kinds: set[Kind] = {"data", "parity"}
    assert {source.kind for source, _ in everything(estate.stripes, {3})} == kinds


def test_what_is_gained_is_told_before_anything_is_computed() -> None:
    pair, three = StripeMap(1, (4, 4)), StripeMap(2, (4, 4, 4))
    assert estate_of(pair, (0,)).parity_count == 0
    assert further_losses(pair, {0}, [(estate_of(pair, (0,)), {1})]) == 0
    assert further_losses(three, {0}, [(estate_of(three, (0,)), {1, 2})]) == 1  # as without it
    four = StripeMap(1, (4, 4, 4, 4))
    assert further_losses(four, {0}, []) == 0
    assert further_losses(four, {0}, [(estate_of(four, (0,)), {1, 2, 3})]) == 1
    assert further_losses(four, {0}, [(estate_of(four, (0,)), {1, 2})]) == 0
    assert further_losses(four, {0, 3}, [(estate_of(four, (0,)), {1, 2})]) == 0
    assert further_losses(four, {0, 3}, []) == -1
