"""Layouts: where shards lie in their node's image, and what follows for sizes and participants."""

from holdfast.protocol.layout import Geometry, Layout, ShardPlace
from holdfast.protocol.placement import place
from hypothesis import given
from hypothesis import strategies as st

CHUNK_BYTES = 64
PLACES = st.lists(st.builds(ShardPlace, st.integers(0, 5), st.integers(0, 1000)), max_size=20).map(tuple)


def geometry_of(layout: Layout, *, group_size: int = 3, parity: int = 1) -> Geometry:
    placement = place([f"d{node}" for node in range(6)], group_size=group_size, parity=parity)
    return Geometry(layout=layout, placement=placement, parity_count=parity, chunk_bytes=CHUNK_BYTES)


@given(shards=PLACES)
def test_shards_of_a_node_fill_its_image_end_to_end_in_role_order(shards: tuple[ShardPlace, ...]) -> None:
    layout = Layout(shards, 0, 1)
    for node in range(6):
        end = 0
        for role in layout.roles_on(node):
            assert layout.offset_of(role) == end
            end += shards[role].shard_bytes
        assert layout.image_bytes(node) == end
        assert 0 <= layout.chunk_count(node, CHUNK_BYTES) * CHUNK_BYTES - end < CHUNK_BYTES
    roles = sorted(role for node in range(6) for role in layout.roles_on(node))
    assert roles == list(range(len(shards)))


@given(shards=PLACES)
def test_a_commit_needs_the_fact_of_whole_groups_that_hold_a_byte_and_of_no_others(
    shards: tuple[ShardPlace, ...],
) -> None:
    layout = Layout(shards, 0, 1)
    geometry = geometry_of(layout)
    for group in geometry.placement.groups:
        concerned = any(layout.image_bytes(node) for node in group)
        assert set(group) & geometry.participants == (set(group) if concerned else set())
    for node in set(range(6)) - geometry.participants:
        assert geometry.data_bytes(node) == geometry.parity_bytes(node) == geometry.digest_count(node) == 0


@given(shards=PLACES)
def test_a_slot_has_a_digest_for_each_chunk_of_the_group_and_each_own_parity_chunk(
    shards: tuple[ShardPlace, ...],
) -> None:
    geometry = geometry_of(Layout(shards, 0, 1))
    for node in range(6):
        data = sum(geometry.data_bytes(member) for member in geometry.group_of(node)) // CHUNK_BYTES
        assert geometry.digest_count(node) == data + geometry.parity_bytes(node) // CHUNK_BYTES


def test_equal_images_take_memory_of_m_over_k() -> None:
    layout = Layout(tuple(ShardPlace(node, 20 * CHUNK_BYTES) for node in range(6)), 0, 1)
    geometry = geometry_of(layout, group_size=6, parity=2)
    assert {geometry.parity_bytes(node) for node in range(6)} == {10 * CHUNK_BYTES}


@given(first=PLACES, second=PLACES, every=st.integers(1, 9), version=st.integers(1, 9))
def test_the_id_tells_images_apart_and_nothing_else(
    first: tuple[ShardPlace, ...], second: tuple[ShardPlace, ...], every: int, version: int
) -> None:
    assert Layout(first, 0, 1).layout_id == Layout(first, 7, every, version).layout_id
    assert (Layout(first, 0, 1).layout_id == Layout(second, 0, 1).layout_id) == (first == second)


@given(first_step=st.integers(0, 50), every=st.integers(1, 9))
def test_the_cadence_stages_the_first_step_and_every_nth_after_it(first_step: int, every: int) -> None:
    layout = Layout((), first_step, every)
    due = [step for step in range(100) if layout.is_due(step)]
    assert due == list(range(first_step, 100, every))
