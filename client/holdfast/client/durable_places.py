"""Durable copies wherever they are, in a directory or an object store: which is begun from, and whether it is whole."""

from collections.abc import Sequence
from pathlib import Path

from holdfast.client.copies import Copy, copies, damage
from holdfast.client.object_copies import ObjectCopy, object_copies, object_damage
from holdfast.client.objects import is_url
from holdfast.protocol.messages import RestoreAnswer

COPIES_TRIED_COUNT_MAX = 16  # of a job, from the newest back; more are hardly ever kept


def choose(answer: RestoreAnswer) -> Sequence[Copy | ObjectCopy]:
    """The copies to begin from, the best first, if memory has nothing to restore, or what it has was tried too often.

    Raises:
        OSError: where they are can't be read.
    """
    restorable = answer.snapshot is not None and not answer.problem
    if not answer.durable_dir or (restorable and not answer.use_older):
        return []
    found: list[Copy | ObjectCopy] = (
        [*object_copies(answer.durable_dir, answer.job)]
        if is_url(answer.durable_dir)
        else [*copies(Path(answer.durable_dir), answer.job)]
    )
    if restorable and answer.snapshot is not None:
        found = [copy for copy in found if copy.step < answer.snapshot.step]
    return found[::-1][:COPIES_TRIED_COUNT_MAX]


def damage_of(place: str, *, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a copy, as `copies.damage` says it."""
    if is_url(place):
        return object_damage(place, part=part, parts=parts)
    return damage(Path(place), part=part, parts=parts)
