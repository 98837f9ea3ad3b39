"""Where tensors lie: what is copied together lies together, and equal memory has one place."""

import torch
from holdfast.client.flatten import Flat, Leaf
from holdfast.client.manifest import ALIGN_BYTES
from holdfast.client.places import Kind, find_places, lanes_of
from holdfast.client.walk import MemoryKey, memory_key


def flats(**tensors: torch.Tensor) -> dict[str, Flat]:
    return {name: Flat([Leaf((name,), tensor)], None) for name, tensor in tensors.items()}


def keys(*tensors: torch.Tensor) -> set[MemoryKey]:
    return set(map(memory_key, tensors))


def test_kinds_lie_one_behind_the_other_and_nothing_overlaps() -> None:
    small, large, odd, plain = torch.ones(5), torch.ones(100_000), torch.ones(4, 6).t(), torch.ones(7)
    places = find_places(flats(large=large, odd=odd, small=small, plain=plain), keys(large, odd, small))
    kinds = {str(source.path[0]): source.kind for source in places.sources}
    assert kinds == {"plain": Kind.HEAD, "small": Kind.PACKED, "large": Kind.STRAIGHT, "odd": Kind.STRAIGHT}
    assert [source.kind for source in places.sources] == sorted(kinds.values())
    assert places.head_end == ALIGN_BYTES
    ends = [source.piece.end for source in places.sources]
    assert [source.piece.offset for source in places.sources] == [0, *ends[:-1]]
    assert places.payload_bytes == ends[-1]


def test_equal_views_share_a_place_and_empty_ones_take_none() -> None:
    weight, empty = torch.ones(9), torch.ones(0)
    places = find_places(flats(first=weight, tied=weight, empty=empty), keys(weight))
    offsets = {str(entry.path[0]): entry.offset for entry, _ in places.placed}
    assert offsets["first"] == offsets["tied"]
    assert places.payload_bytes == ALIGN_BYTES


def test_the_host_has_one_lane_and_none_without_tensors() -> None:
    tensor = torch.ones(3)
    assert lanes_of(find_places(flats(it=tensor), keys(tensor)).sources)[0] is not None
    assert lanes_of(find_places(flats(it=tensor), set()).sources) == (None, [])  # the head is not a lane's
