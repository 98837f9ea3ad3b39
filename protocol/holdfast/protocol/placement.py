"""Which nodes protect each other: groups of a cluster, spread over failure domains. Pure and deterministic.

Covers the grouping and what it survives. Where a stripe's chunks lie inside a group is the stripe map's.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.survival import memory_factor

# A stripe has one chunk on every member, and GF(2^8) tells 255 chunks apart. Said again here, so
# that planning a cluster does not have to load the coding room; a test holds the two equal.
GROUP_SIZE_MAX = 255

# Ragged groups that need this much more memory than groups of the wished size are worth a word.
_MEMORY_GROWTH_WORTH_A_WARNING = 1.2


class PlacementError(OperatorError):
    """Nodes, group size and parity that do not go together. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(ExitCode.USAGE, message)


@dataclass(frozen=True, slots=True)
class PlacementReport:
    """What a placement survives, in numbers and in words.

    Attributes:
        node_losses: any so many nodes of every group may be lost at once.
        domain_losses: any so many whole failure domains may be lost at once; with one more, some
            choice loses state.
        domain_load_max: the most members of one group that share a domain; 1 is the aim.
        warnings: full sentences for an operator, each ending with what to do; empty if there is
            nothing to say.
    """

    node_losses: int
    domain_losses: int
    domain_load_max: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Groups of nodes that protect each other. Made by `place`.

    Attributes:
        groups: node indices of each group, ascending; every node is in exactly one group.
        domains: the failure domain of each node, by node index.
        group_size: the wished size, which `groups` may miss.
        parity: lost nodes that each group survives.

    Raises:
        PlacementError: the groups are not a partition of the nodes, or one has no room for a data
            chunk.
    """

    groups: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]
    group_size: int
    parity: int
    _group_by_node: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_node = {node: index for index, group in enumerate(self.groups) for node in group}
        members = sorted(node for group in self.groups for node in group)
        if members != list(range(len(self.domains))):
            raise PlacementError(
                f"groups must hold each of the {len(self.domains)} nodes once, found {self.groups}; use place()"
            )
        for group in self.groups:
            if len(group) <= self.parity:
                raise PlacementError(
                    f"a group of {len(group)} nodes has no room for data beside parity "
                    f"{self.parity}; "
                    f"use groups of at least {self.parity + 1} nodes"
                )
        object.__setattr__(self, "_group_by_node", tuple(by_node[node] for node in members))

    def group_of(self, node: int) -> int:
        """The index in `groups` of the group that `node` belongs to."""
        return self._group_by_node[node]

    def report(self) -> PlacementReport:
        """What may be lost at once without losing state, and what an operator should know."""
        loads = [Counter(self.domains[node] for node in group) for group in self.groups]
        domain_losses = min(_domains_within(load, self.parity) for load in loads)
        return PlacementReport(
            node_losses=self.parity,
            domain_losses=domain_losses,
            domain_load_max=max(max(load.values()) for load in loads),
            warnings=tuple(self._warnings(loads, domain_losses)),
        )

    def _warnings(self, loads: Sequence[Counter[str]], domain_losses: int) -> list[str]:
        if self.parity == 0:
            return [
                "Parity 0: crashed processes are survived, a lost node is not. "
                "Set parity to 1 or more (the cluster then needs more nodes than that)."
            ]
        return [
            *self._domain_warnings(loads, domain_losses),
            *self._size_warnings(),
        ]

    def _domain_warnings(self, loads: Sequence[Counter[str]], domain_losses: int) -> list[str]:
        if domain_losses >= self.parity:
            return []  # no two members of a group share a domain, as far as parity reaches
        worst = min(range(len(loads)), key=lambda index: _domains_within(loads[index], self.parity))
        domain, load = loads[worst].most_common(1)[0]
        shared = f"{load} of the {len(self.groups[worst])} nodes of group {worst} are in domain {domain!r}"
        hint = self._advice()
        if domain_losses == 0:
            return [f"The loss of one domain can lose state: {shared}, and parity is {self.parity}. {hint}"]
        survived = f"any {domain_losses} whole domain{'s' if domain_losses > 1 else ''}"
        return [f"Only the loss of {survived} is survived, with parity {self.parity}: {shared}. {hint}"]

    def _advice(self) -> str:
        largest = max(Counter(self.domains).values())
        spread = len(self.domains) // largest  # members per group when each domain gives every group at most one
        if spread > self.parity:
            return f"Set group_size to {spread} or less, spread the nodes over more domains, or raise parity."
        return "Spread the nodes over more domains, or raise parity."

    def _size_warnings(self) -> list[str]:
        wished = min(self.group_size, len(self.domains))
        sizes = sorted({len(group) for group in self.groups})
        text = " and ".join(str(size) for size in sizes)
        if sizes[-1] > wished:
            return [
                f"Groups of {text} nodes instead of {wished}: smaller ones have no room for data "
                f"beside parity "
                f"{self.parity}. Set group_size to {sizes[-1]} to say so yourself."
            ]
        growth = memory_factor(size=sizes[0], parity=self.parity) / memory_factor(size=wished, parity=self.parity)
        if growth < _MEMORY_GROWTH_WORTH_A_WARNING:
            return []
        return [
            f"{len(self.domains)} nodes do not fill groups of {wished}, so they are in groups of "
            f"{text}: a node holds "
            f"{memory_factor(size=sizes[0], parity=self.parity):.2f} x its image per slot instead of "
            f"{memory_factor(size=wished, parity=self.parity):.2f} x. {self._size_advice(wished)}"
        ]

    def _size_advice(self, wished: int) -> str:
        fewer = max(len(self.groups) - 1, 1)
        size = -(-len(self.domains) // fewer)
        if len(self.groups) > 1 and size <= GROUP_SIZE_MAX:
            return f"Set group_size to {size} for {'one group' if fewer == 1 else f'{fewer} groups'}."
        return f"Use a multiple of {wished} nodes."


def place(domains: Sequence[str], *, group_size: int, parity: int) -> Placement:
    """Group nodes so that the members of a group fail independently.

    The nodes are dealt out like cards, domain by domain, the largest domain first. So each group gets its even share
    of every domain (rounded up or down), sizes differ by at most one, and no grouping of these sizes has a smaller
    largest share. How many whole domains may be lost is the best possible in clusters of up to 8 nodes (brute force);
    in rare larger ones another grouping would survive one domain more. Nodes that stand next to each other in the
    list, and so perhaps in a rack that nobody named, end in different groups.

    Args:
        domains: the failure domain of each node, by node index (N of them).
        group_size: wished members per group (n): the number of groups is ceil(N / n), or fewer
            where that leaves a group with no room for data. Larger than N means one group.
        parity: node losses that each group survives (m), 0 or more.

    Returns:
        The same placement for the same arguments, on every machine.

    Raises:
        PlacementError: fewer than parity + 1 nodes or members, or a group beyond `GROUP_SIZE_MAX`.
    """
    node_count = len(domains)
    _refuse_bad_shape(node_count, group_size=group_size, parity=parity)
    group_count = min(-(-node_count // group_size), node_count // (parity + 1))
    if -(-node_count // group_count) > GROUP_SIZE_MAX:
        raise PlacementError(
            f"{node_count} nodes with parity {parity} need a group of "
            f"{-(-node_count // group_count)}, the code allows "
            f"{GROUP_SIZE_MAX}; use a parity of at most {GROUP_SIZE_MAX // 2} or another number of "
            f"nodes"
        )
    nodes_by_domain: dict[str, list[int]] = {}
    for node, domain in enumerate(domains):
        nodes_by_domain.setdefault(domain, []).append(node)
    # A stable sort: domains of one size stay in the order of their first node.
    largest_first = sorted(nodes_by_domain.values(), key=len, reverse=True)
    dealt = [node for nodes in largest_first for node in nodes]
    return Placement(
        groups=tuple(tuple(sorted(dealt[index::group_count])) for index in range(group_count)),
        domains=tuple(domains),
        group_size=group_size,
        parity=parity,
    )


def _refuse_bad_shape(node_count: int, *, group_size: int, parity: int) -> None:
    if parity < 0:
        raise PlacementError(f"parity must be 0 or more, found {parity}; set parity to 0 or more")
    if not parity < group_size <= GROUP_SIZE_MAX:
        raise PlacementError(
            f"a group must have {parity + 1} (parity + 1) to {GROUP_SIZE_MAX} nodes, found a group "
            f"size of "
            f"{group_size}; set group_size to a value between the two"
        )
    if node_count <= parity:
        raise PlacementError(
            f"parity {parity} needs at least {parity + 1} nodes, found {node_count}; "
            f"set parity to {max(node_count - 1, 0)} or less, or add nodes"
        )


def _domains_within(load: Counter[str], budget: int) -> int:
    """How many domains, whichever they are, together have at most `budget` members."""
    lost = 0
    for count, members in enumerate(sorted(load.values(), reverse=True)):
        lost += members
        if lost > budget:
            return count
    return len(load)
