"""Groups of nodes: the rule against brute force for small clusters, and what the report says."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from holdfast.coding import MAX_CODE_LENGTH
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.placement import GROUP_SIZE_MAX, Placement, PlacementError, place
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def clusters(draw: st.DrawFn, node_count_max: int = 60) -> tuple[list[str], int, int]:
    """(domains, group_size, parity) that go together."""
    domains = draw(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=node_count_max))
    parity = draw(st.integers(0, len(domains) - 1))
    return domains, draw(st.integers(parity + 1, max(parity + 1, 20))), parity


def domain_loads(placement: Placement) -> list[Counter[str]]:
    return [Counter(placement.domains[node] for node in group) for group in placement.groups]


def survives(placement: Placement, lost: set[str]) -> bool:
    """The dumb rule: no group has more than `parity` members in the lost domains."""
    return all(sum(placement.domains[node] in lost for node in group) <= placement.parity for group in placement.groups)


def partitions(nodes: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to split nodes into groups of these sizes, some of them more than once."""
    if not sizes:
        yield ()
        return
    for group in combinations(nodes, sizes[0]):
        rest = [node for node in nodes if node not in group]
        yield from ((group, *others) for others in partitions(rest, sizes[1:]))


@given(clusters())
def test_groups_are_a_balanced_partition_with_room_for_data(cluster: tuple[list[str], int, int]) -> None:
    domains, group_size, parity = cluster
    placement = place(domains, group_size=group_size, parity=parity)
    assert sorted(node for group in placement.groups for node in group) == list(range(len(domains)))
    sizes = [len(group) for group in placement.groups]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > parity
    assert len(sizes) == min(math.ceil(len(domains) / group_size), len(domains) // (parity + 1))
    for index, group in enumerate(placement.groups):
        assert list(group) == sorted(group)
        assert all(placement.group_of(node) == index for node in group)


@given(clusters())
def test_every_domain_is_spread_as_evenly_as_it_can_be(cluster: tuple[list[str], int, int]) -> None:
    domains, group_size, parity = cluster
    placement = place(domains, group_size=group_size, parity=parity)
    loads = domain_loads(placement)
    for domain, node_count in Counter(domains).items():
        assert max(load[domain] for load in loads) == math.ceil(node_count / len(loads))
    assert placement.report().domain_load_max == max(max(load.values()) for load in loads)


@given(clusters(node_count_max=24))
def test_the_guaranteed_domain_losses_are_exact(cluster: tuple[list[str], int, int]) -> None:
    domains, group_size, parity = cluster
    placement = place(domains, group_size=group_size, parity=parity)
    losses = placement.report().domain_losses
    names = sorted(set(domains))
    assert all(survives(placement, set(lost)) for lost in combinations(names, losses))
    assert losses < len(names)
    assert not all(survives(placement, set(lost)) for lost in combinations(names, losses + 1))


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=8), st.integers(2, 4), st.integers(0, 2))
def test_no_other_grouping_survives_more_domains(domains: list[str], group_size: int, parity: int) -> None:
    if len(domains) <= parity or group_size <= parity:
        return
    placement = place(domains, group_size=group_size, parity=parity)
    report = placement.report()
    sizes = [len(group) for group in placement.groups]
    others = [
        Placement(groups=groups, domains=tuple(domains), group_size=group_size, parity=parity).report()
        for groups in partitions(range(len(domains)), sizes)
    ]
    assert report.domain_load_max == min(other.domain_load_max for other in others)
    assert report.domain_losses == max(other.domain_losses for other in others)


@given(clusters())
def test_the_advice_to_use_smaller_groups_is_good(cluster: tuple[list[str], int, int]) -> None:
    domains, group_size, parity = cluster
    for warning in place(domains, group_size=group_size, parity=parity).report().warnings:
        _, found, rest = warning.partition("Set group_size to ")
        if found and "or less" in rest:
            better = place(domains, group_size=int(rest.split()[0]), parity=parity).report()
            assert better.domain_load_max == 1
            assert not any("domain" in text for text in better.warnings)


def test_distinct_domains_need_no_warning_and_neighbours_part() -> None:
    placement = place([f"host-{node}" for node in range(16)], group_size=8, parity=2)
    assert placement.groups == (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    report = placement.report()
    assert (report.node_losses, report.domain_losses, report.domain_load_max) == (2, 2, 1)
    assert report.warnings == ()


def test_the_largest_domains_are_dealt_out_first() -> None:
    """In the order of the file, this cluster would survive 3 domains and not 4."""
    domains = list("fddbaffdcdbdciaiaaiibdaccciiaecehafcdca")
    assert place(domains, group_size=9, parity=6).report().domain_losses == 4


def test_two_nodes_per_host_land_in_different_groups() -> None:
    hosts = ["h0", "h0", "h1", "h1", "h2", "h2", "h3", "h3"]
    assert place(hosts, group_size=4, parity=1).report().domain_load_max == 1


@pytest.mark.parametrize(
    ("domains", "group_size", "parity", "words"),
    [
        (["a", "b"], 8, 0, ["Parity 0", "a lost node is not", "Set parity to 1"]),
        (["a", "a", "b"], 8, 1, ["The loss of one domain can lose state", "2 of the 3 nodes", "domain 'a'"]),
        (["a", "a", "b", "c", "d", "e"], 6, 2, ["Only the loss of any 1 whole domain", "Set group_size to 3"]),
        (list("abcdefghi"), 8, 5, ["Groups of 9 nodes instead of 8", "parity 5"]),
        (list("abcdefghi"), 8, 2, ["do not fill groups of 8", "2.00 x", "1.33 x", "Set group_size to 9"]),
    ],
)
def test_what_an_operator_should_know_is_said(
    domains: list[str], group_size: int, parity: int, words: list[str]
) -> None:
    (warning,) = place(domains, group_size=group_size, parity=parity).report().warnings
    for word in words:
        assert word in warning
    assert warning.endswith(".")


@pytest.mark.parametrize(
    ("node_count", "group_size", "parity", "words"),
    [
        (2, 8, 2, "parity 2 needs at least 3 nodes, found 2; set parity to 1 or less"),
        (8, 2, 2, "a group must have 3 .* to 255 nodes, found a group size of 2"),
        (8, 256, 2, "found a group size of 256"),
        (8, 8, -1, "parity must be 0 or more, found -1"),
        (0, 8, 0, "needs at least 1 nodes, found 0"),
        (300, 255, 200, "need a group of 300, the code allows 255"),
    ],
)
def test_what_does_not_go_together_is_refused_with_numbers(
    node_count: int, group_size: int, parity: int, words: str
) -> None:
    with pytest.raises(PlacementError, match=words) as caught:
        place([str(node) for node in range(node_count)], group_size=group_size, parity=parity)
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("groups", [((0, 1),), ((0, 1), (1, 2)), ((0, 1), (2, 3)), ((0, 1, 2), ())])
def test_groups_that_are_no_partition_are_refused(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(PlacementError):
        Placement(groups=groups, domains=("a", "b", "c"), group_size=3, parity=0)


def test_the_code_and_the_placement_have_one_limit() -> None:
    assert GROUP_SIZE_MAX == MAX_CODE_LENGTH
