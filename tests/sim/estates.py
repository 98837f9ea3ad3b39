"""The books on estates: who really holds which part, with which bytes, and what that promises.

Once all heirs of an estate hold their part, losing a node more is as good as before the first was lost: from then on
none may let its part go, but for a newer commit, a wider estate that all hold, or the return of those who were away.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.coding import chunk_digest
from holdfast.daemon.core.held_estate import HeldEstate, estate_in
from holdfast.protocol.estates import Estate, further_losses

from sim.coder import Held, combine
from sim.machine import NODE_BYTES_FREE, Worker
from sim.promises import JobSnapshot, promise

if TYPE_CHECKING:
    from sim.truth import Truth

Absent = tuple[int, ...]
Place = tuple[JobSnapshot, Absent]


@dataclass(slots=True)
class EstateBooks:
    """All estates of one cluster."""

    truth: "Truth"
    parts: dict[Place, set[int]] = field(default_factory=dict)  # who holds its part now
    promised: set[Place] = field(default_factory=set)  # all heirs held their part at once
    void: set[Place] = field(default_factory=set)  # those who were away were whole again at some time
    checked: int = 0  # parts whose bytes were looked at

    def lost(self, node: int) -> None:
        """A machine's memory is gone."""
        for nodes in self.parts.values():
            nodes.discard(node)

    def observe(self, worker: Worker) -> None:
        """Hold what a node claims against the books."""
        node = worker.machine.node
        claimed: set[Place] = set()
        for name, parts in worker.node.jobs.items():
            for held in parts.job.estates:
                place = ((name, held.snapshot), held.absent)
                claimed.add(place)
                if node not in self.parts.get(place, set()):
                    self._check_bytes(worker, place, held)
                    self.parts.setdefault(place, set()).add(node)
        for place, nodes in self.parts.items():
            if self.is_whole_again(place):
                self.void.add(place)
            if node in nodes and place not in claimed:
                self._let_go(worker, place)
                nodes.discard(node)
            estate = self.estate(place, node)
            if estate is not None and len(nodes) == len(estate.heirs) and place not in self.void:
                self.promised.add(place)

    def estate(self, place: Place, heir: int) -> Estate | None:
        """The estate's map."""
        geometry = self.truth.geometry(place[0])
        return estate_in(geometry, geometry.group_of(heir), place[1])

    def is_whole_again(self, place: Place) -> bool:
        """Whether those who were away hold the snapshot."""
        (job, snapshot), absent = place
        return all(self.truth.holds(node, job, snapshot) for node in absent)

    def _let_go(self, worker: Worker, place: Place) -> None:
        if place not in self.promised or place in self.void:
            return
        key, absent = place
        parts = worker.node.jobs.get(key[0])
        if parts is None or parts.job.committed != key[1] or worker.machine.free_bytes < NODE_BYTES_FREE:
            return
        wider = [
            other for (k, other) in self.promised if k == key and set(other) > set(absent) and self._is_held((k, other))
        ]
        promise(wider, f"{worker.machine.name} let go what {absent} left of {key[1]} of {key[0]}; it is still needed")

    def _is_held(self, place: Place) -> bool:
        return bool(self.parts.get(place))

    def _check_bytes(self, worker: Worker, place: Place, held: HeldEstate) -> None:
        key, absent = place
        node, geometry = worker.machine.node, self.truth.geometry(key)
        group, size = geometry.group_of(node), geometry.chunk_bytes
        estate = estate_in(geometry, group, absent)
        promise(estate is not None and node not in absent, f"node {node} keeps an estate of {absent} that is none")
        assert estate is not None
        memory = worker.machine.held.get(held.memory, Held(bytearray(), bytearray(), []))
        what = f"of {absent} of {key[1]} of {key[0]} on node {node}"
        stripes = geometry.stripes(node)
        images = [self.truth.image(key, member) for member in group]
        parities = [self.truth.parity(key, member) for member in group]
        for chunk in range(estate.chunk_count(group.index(node))):
            factors, chunks = [], []
            for stripe, position, factor in estate.recipe(group.index(node), chunk):
                if position < stripes.data_count:
                    member = stripes.data_members(stripe)[position]
                    at = stripes.chunk_at(stripe, member)
                    assert at is not None
                    chunks.append(images[member][at * size : (at + 1) * size])
                else:
                    member = stripes.parity_members(stripe)[position - stripes.data_count]
                    at = stripes.parity_index(stripe, member)
                    chunks.append(parities[member][at * size : (at + 1) * size])
                factors.append(factor)
            expected = combine(factors, chunks, size)
            found = bytes(memory.parity[chunk * size : (chunk + 1) * size])
            promise(found == expected, f"chunk {chunk} of the estate {what} is wrong")
            promise(held.digests[chunk] == chunk_digest(expected), f"the digest of chunk {chunk} of the estate {what}")
            promise(memory.digests[chunk] == held.digests[chunk], f"the table of the estate {what} is not the core's")
        self.checked += 1

    def more_losses(self, key: JobSnapshot, group: tuple[int, ...], lost: Iterable[int], *, sure: bool = False) -> int:
        """How many more members of a group can really be lost; `sure`: counting only what all heirs had at once."""
        members = {group.index(node) for node in lost}
        geometry = self.truth.geometry(key)
        estates = []
        for place, nodes in self.parts.items():
            if place[0] != key or not set(place[1]) <= set(group) or (sure and place not in self.promised - self.void):
                continue
            estate = estate_in(geometry, group, place[1])
            if estate is not None:
                estates.append((estate, {group.index(node) for node in nodes} - members))
        return further_losses(geometry.stripes(group[0]), members, estates)
