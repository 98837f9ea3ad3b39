"""`holdfast plan`: what a cluster would survive and what it would cost, before there is one. Needs no daemon.

Covers the questions and the answers' layout; the formulas are `holdfast.protocol.survival`'s.
"""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.cli.arguments import Subparsers, above_zero, add_json_flag, whole
from holdfast.cli.output import emit, emit_json, pairs
from holdfast.protocol import survival
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.failure_trace import Loss, read_trace, replay
from holdfast.protocol.limits import NODE_COUNT_MAX
from holdfast.protocol.placement import GROUP_SIZE_MAX, Placement, place
from holdfast.protocol.settings import SLOTS_MAX, SLOTS_MIN

# 419 unexpected interruptions of 16,384 GPUs (2,048 nodes) in 54 days: Llama 3, 2024, section 3.3.4. Not all of them
# were losses of a node, so this is on the careful side.
MTBF_H_DEFAULT = 6334.0
REPLACE_S_DEFAULT = 600.0  # until a spare machine has taken a lost node's slot
DOMAINS_FILE_BYTES_MAX = 1 << 20
TRACE_FILE_BYTES_MAX = 64 << 20
LOSSES_LISTED_MAX = 100  # of a trace, with their times, in --json
GROUPS_SHOWN_MAX = 8  # --json lists all
CHANCE_SHOWN_MIN = 1e-9  # what the model leaves out (whole domains, software) is likelier than that

TEXT_COLUMNS = 100

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, in base units. None: not given, so what depends on it is not answered."""

    placement: Placement
    image_bytes: int
    slots: int
    mtbf_h: float
    replace_s: float
    link_bytes_per_s: float | None
    step_s: float | None
    snapshot_s: float | None
    wanted_loss: float | None = None
    trace: tuple[Loss, ...] = ()

    @property
    def size(self) -> int:
        """Members of the smallest group, whose nodes hold the most."""
        return min(len(group) for group in self.placement.groups)

    @property
    def job_mtbf_s(self) -> float:
        """Mean seconds between losses of any node: how often the whole job is interrupted."""
        return self.mtbf_h * 3600 / len(self.placement.domains)

    def seconds_for(self, size_bytes: int) -> float | None:
        """How long so many bytes take in one direction of a node's link, or None if its speed was not given."""
        return None if self.link_bytes_per_s is None else size_bytes / self.link_bytes_per_s


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "plan",
        help="what a cluster would survive, and what it would cost",
        description="What a cluster would survive, and cost in memory, traffic and time. Needs no daemon.",
        epilog="Example: holdfast plan --nodes 64 --parity 2 --image-gib 96 --link-gb-s 25 --step-s 4 --snapshot-s 0.1",
    )
    add = parser.add_argument
    add("--nodes", type=whole(1, NODE_COUNT_MAX), required=True, metavar="N", help="nodes of the cluster")
    add("--parity", type=whole(0, GROUP_SIZE_MAX - 1), default=2, metavar="M", help="lost nodes per group survived [2]")
    add("--group-size", type=whole(1, GROUP_SIZE_MAX), default=8, metavar="n", help="wished nodes per group [8]")
    add("--image-gib", type=above_zero(1 << 20), required=True, metavar="G", help="state per node and snapshot, GiB")
    add("--slots", type=whole(SLOTS_MIN, SLOTS_MAX), default=2, metavar="S", help="snapshots there is room for [2]")
    add("--link-gb-s", type=above_zero(1e6), metavar="X", help="a node's link, each way, that snapshots may use, GB/s")
    add(
        "--mtbf-hours",
        type=above_zero(1e9),
        default=MTBF_H_DEFAULT,
        metavar="H",
        help=f"hours between losses of one node [{MTBF_H_DEFAULT:.0f}, from Llama 3's report]",
    )
    add(
        "--replace-s",
        type=above_zero(1e9),
        default=REPLACE_S_DEFAULT,
        metavar="R",
        help=f"seconds until another machine has a lost node's slot [{REPLACE_S_DEFAULT:.0f}]",
    )
    add("--step-s", type=above_zero(1e6), metavar="S", help="seconds of one training step")
    add("--snapshot-s", type=above_zero(1e6), metavar="T", help="seconds that one snapshot holds training up")
    add("--wanted-loss", type=above_zero(1.0), metavar="P", help="the chance per year to lose state that is acceptable")
    add("--trace", type=Path, metavar="FILE", help="replay node losses, a line HOURS,NODE each (nodes from 0)")
    add("--domains", metavar="FILE|D", help="failure domains: a file with one per node and line, or how many there are")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Answer on stdout."""
    domains = _domains(args.domains, args.nodes)
    question = Question(
        placement=place(domains, group_size=args.group_size, parity=args.parity),
        image_bytes=round(args.image_gib * _GIB),
        slots=args.slots,
        mtbf_h=args.mtbf_hours,
        replace_s=args.replace_s,
        link_bytes_per_s=None if args.link_gb_s is None else args.link_gb_s * 1e9,
        step_s=args.step_s,
        snapshot_s=args.snapshot_s,
        wanted_loss=args.wanted_loss,
        trace=() if args.trace is None else _trace(args.trace, args.nodes),
    )
    answer = answer_of(question)
    if args.json:
        emit_json("holdfast.plan/1", answer)
    else:
        emit(_as_text(question, answer))
    return int(ExitCode.DONE)


def answer_of(question: Question) -> dict[str, object]:
    """The whole answer as plain values; each name ends in its unit."""
    placement = question.placement
    report = placement.report()
    return {
        "nodes": len(placement.domains),
        "domains": len(set(placement.domains)),
        "parity": placement.parity,
        "group_size": placement.group_size,
        "groups": [list(group) for group in placement.groups],
        "survives": {"nodes_per_group": report.node_losses, "whole_domains": report.domain_losses},
        "memory": _memory(question),
        "traffic": _traffic(question),
        "odds": _odds(question),
        "interval": _interval(question),
        "smallest_parity": _smallest_parity(question),
        "trace": _replayed(question),
        "warnings": list(report.warnings),
    }


def _memory(question: Question) -> dict[str, float]:
    size, parity = question.size, question.placement.parity
    return {
        "image_bytes": question.image_bytes,
        "slots": question.slots,
        "factor": survival.memory_factor(size=size, parity=parity),
        "node_bytes": survival.held_bytes(question.image_bytes, size=size, parity=parity, slots=question.slots),
    }


def _traffic(question: Question) -> dict[str, float | None]:
    parity = question.placement.parity
    sent_bytes = survival.sent_bytes(question.image_bytes, parity=parity)
    rebuilt_bytes = survival.rebuilt_bytes(question.image_bytes, size=question.size, parity=parity) if parity else 0
    return {
        "sent_bytes": sent_bytes,
        "received_bytes": sent_bytes,
        "link_bytes_per_s": question.link_bytes_per_s,
        "snapshot_s": question.seconds_for(sent_bytes),
        "rebuilt_bytes": rebuilt_bytes,
        "rebuild_s": question.seconds_for(rebuilt_bytes),
    }


def _odds(question: Question) -> dict[str, float]:
    """How likely state is lost, with repair, for losses of nodes that are independent of each other."""
    rebuild_s = _traffic(question)["rebuild_s"] or 0.0
    repair_s = question.replace_s + rebuild_s

    def loss_within(time_h: float) -> float:
        return _loss_within(time_h, question.placement, mtbf_h=question.mtbf_h, repair_s=repair_s)

    per_day, per_year = loss_within(survival.HOURS_PER_DAY), loss_within(survival.HOURS_PER_YEAR)
    return {
        "node_mtbf_hours": question.mtbf_h,
        "job_mtbf_hours": question.job_mtbf_s / 3600,
        "repair_s": repair_s,
        "loss_per_day": per_day,
        "loss_per_year": per_year,
        "survival_per_day": 1 - per_day,
        "survival_per_year": 1 - per_year,
    }


def _loss_within(time_h: float, placement: Placement, *, mtbf_h: float, repair_s: float) -> float:
    expected = survival.losses_expected(
        time_h,
        group_sizes=[len(group) for group in placement.groups],
        parity=placement.parity,
        mtbf_h=mtbf_h,
        repair_h=repair_s / 3600,
    )
    return survival.loss_probability(expected)


def _smallest_parity(question: Question) -> dict[str, float | int | None] | None:
    """The smallest parity whose chance to lose state within a year is as small as wanted; None: no parity is enough."""
    if question.wanted_loss is None:
        return None
    domains, size = question.placement.domains, question.placement.group_size
    for parity in range(min(size, len(domains))):
        placement = place(domains, group_size=size, parity=parity)
        smallest = min(len(group) for group in placement.groups)
        if smallest <= parity:
            break
        rebuilt = survival.rebuilt_bytes(question.image_bytes, size=smallest, parity=parity) if parity else 0
        repair_s = question.replace_s + (question.seconds_for(rebuilt) or 0.0)
        chance = _loss_within(survival.HOURS_PER_YEAR, placement, mtbf_h=question.mtbf_h, repair_s=repair_s)
        if chance <= question.wanted_loss:
            node_bytes = survival.held_bytes(question.image_bytes, size=smallest, parity=parity, slots=question.slots)
            return {"wanted": question.wanted_loss, "parity": parity, "loss_per_year": chance, "node_bytes": node_bytes}
    return {"wanted": question.wanted_loss, "parity": None, "loss_per_year": None, "node_bytes": None}


def _replayed(question: Question) -> dict[str, object] | None:
    """The trace's losses against this placement, each node back after its replacement and rebuild."""
    if not question.trace:
        return None
    placement, repair_s = question.placement, _odds(question)["repair_s"]
    found = replay(question.trace, groups=placement.groups, parity=placement.parity, repair_h=repair_s / 3600)
    return {
        "node_losses": found.node_losses,
        "hours": found.hours,
        "worst_in_a_group": found.worst,
        "state_losses": len(found.state_losses),
        "state_losses_h": list(found.state_losses[:LOSSES_LISTED_MAX]),
    }


def _interval(question: Question) -> dict[str, float | str | None] | None:
    """How often to take a snapshot: as Young says, but not faster than it can be protected, in whole steps."""
    if question.snapshot_s is None:
        return None
    best_s = survival.young_interval_s(question.snapshot_s, mtbf_s=question.job_mtbf_s)
    protect_s = _traffic(question)["snapshot_s"] or 0.0
    interval_s, limit = max((best_s, "cost"), (protect_s, "protection"), (question.snapshot_s, "snapshot"))
    steps = None
    if question.step_s is not None:
        # Rounded up where protection is the limit: one step fewer would never be protected in time.
        exact = interval_s / question.step_s
        steps = max(round(exact) if limit == "cost" else -int(-exact // 1), 1)
        if steps == 1 and question.step_s > interval_s:
            limit = "step"
        interval_s = steps * question.step_s
    wasted = survival.waste(interval_s, snapshot_s=question.snapshot_s, mtbf_s=question.job_mtbf_s)
    daly_s = survival.daly_interval_s(question.snapshot_s, mtbf_s=question.job_mtbf_s)
    return {
        "young_s": best_s,
        "daly_s": daly_s,
        "interval_s": interval_s,
        "every": steps,
        "limit": limit,
        "waste": wasted,
    }


def _trace(file: Path, node_count: int) -> tuple[Loss, ...]:
    try:
        with file.open("rb") as stream:
            content = stream.read(TRACE_FILE_BYTES_MAX + 1)
        if len(content) > TRACE_FILE_BYTES_MAX:
            raise ValueError(f"expected at most {TRACE_FILE_BYTES_MAX >> 20} MiB")
        return tuple(read_trace(content.decode("utf-8"), node_count=node_count))
    except (OSError, ValueError) as error:
        raise OperatorError(
            ExitCode.USAGE, f"--trace: can't use {file}: {error}; give a file with one HOURS,NODE per line"
        ) from error


def _domains(given: str | None, node_count: int) -> list[str]:
    """The failure domain of each node: its own, the lines of a file, or nodes in turn over a number of domains."""
    if given is None:
        return [f"node-{node}" for node in range(node_count)]
    if given.isascii() and given.isdigit():
        count = int(given)
        if not 1 <= count <= node_count:
            raise OperatorError(
                ExitCode.USAGE,
                f"--domains: expected 1 to {node_count} (the number of nodes), found {given}; correct it",
            )
        return [f"domain-{node * count // node_count}" for node in range(node_count)]
    try:
        with Path(given).open("rb") as stream:
            text = stream.read(DOMAINS_FILE_BYTES_MAX).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(
            ExitCode.USAGE,
            f"--domains: can't read {given}: {error}; give a number, or a file with the domain of one node per line",
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != node_count:
        raise OperatorError(
            ExitCode.USAGE,
            f"--domains: expected {node_count} lines in {given}, one per node, found {len(lines)}; correct one of them",
        )
    return lines


def _as_text(question: Question, answer: Mapping[str, object]) -> str:
    placement = question.placement
    sections = [
        (_headline(placement), _group_rows(placement.groups)),
        ("Survives the loss of", _survival_rows(question)),
        ("Each node needs", _cost_rows(question)),
        ("State would be lost", _odds_rows(question)),
    ]
    if question.wanted_loss is not None:
        sections.append(("For the chance that is wanted", _wanted_rows(question)))
    if question.trace:
        sections.append(("The trace", _trace_rows(question)))
    if question.snapshot_s is not None:
        sections.append(("A snapshot is worth taking", _interval_rows(question)))
    text = "\n\n".join(f"{title}\n{pairs(rows)}" for title, rows in sections)
    warnings = answer["warnings"]
    assert isinstance(warnings, list)
    wrapped = (textwrap.fill(f"Warning: {warning}", TEXT_COLUMNS, subsequent_indent="  ") for warning in warnings)
    return "\n\n".join([text, *wrapped])


def _headline(placement: Placement) -> str:
    node_count, group_count = len(placement.domains), len(placement.groups)
    sizes = " and ".join(str(size) for size in sorted({len(group) for group in placement.groups}, reverse=True))
    return (
        f"{_count(node_count, 'node')} in {_count(len(set(placement.domains)), 'failure domain')}, "
        f"{_count(group_count, 'group')} of {sizes}, parity {placement.parity}"
    )


def _group_rows(groups: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    rows = [(f"group {index}", " ".join(map(str, group))) for index, group in enumerate(groups[:GROUPS_SHOWN_MAX])]
    if len(groups) > GROUPS_SHOWN_MAX:
        rows.append(("...", f"{len(groups) - GROUPS_SHOWN_MAX} more; --json lists all"))
    return rows


def _survival_rows(question: Question) -> list[tuple[str, str]]:
    report = question.placement.report()
    group_count = len(question.placement.groups)
    where = "in each group at once" if group_count > 1 else "at once"
    if question.placement.parity == 0:
        return [("nodes", "none"), ("processes", "any number")]
    return [
        ("nodes", f"any {report.node_losses} {where}"),
        ("domains", _domain_losses(report.domain_losses, len(set(question.placement.domains)))),
        ("processes", "any number"),
    ]


def _domain_losses(losses: int, domain_count: int) -> str:
    if losses == 0:
        return "not of every one (see the warning)"
    return f"any {losses} of the {domain_count}{' at once' if losses > 1 else ''}"


def _cost_rows(question: Question) -> list[tuple[str, str]]:
    memory, traffic = _memory(question), _traffic(question)
    slots, factor = question.slots, memory["factor"]
    rows = [("memory", f"{_gib(memory['node_bytes'])} ({slots} slots x {factor:.2f} x {_gib(question.image_bytes)})")]
    if question.placement.parity:
        both_ways, rebuilt = _gib(traffic["sent_bytes"] or 0), _gib(traffic["rebuilt_bytes"] or 0)
        rows.append(("traffic", f"{both_ways} each way per snapshot{_at(traffic['snapshot_s'])}"))
        rows.append(("rebuild", f"{rebuilt} received by its replacement{_at(traffic['rebuild_s'])}"))
    return rows


def _odds_rows(question: Question) -> list[tuple[str, str]]:
    odds = _odds(question)
    assumed = (
        f"a node fails every {question.mtbf_h:,.0f} h (any of the {len(question.placement.domains)} every "
        f"{_duration(question.job_mtbf_s)}), independently of others,\n"
        f"and is replaced and rebuilt within {_duration(odds['repair_s'])}"
    )
    return [
        ("in a day", _chance(odds["loss_per_day"])),
        ("in a year", _chance(odds["loss_per_year"])),
        ("assuming", assumed),
    ]


def _wanted_rows(question: Question) -> list[tuple[str, str]]:
    found = _smallest_parity(question)
    assert found is not None
    wanted = f"{_chance(question.wanted_loss or 0.0)} in a year"
    if found["parity"] is None:
        return [("wanted", wanted), ("parity", "none is enough in groups of this size: replace nodes sooner")]
    reached = f"{found['parity']}: {_chance(found['loss_per_year'] or 0.0)}, {_gib(found['node_bytes'] or 0)} per node"
    return [("wanted", wanted), ("parity", reached)]


def _trace_rows(question: Question) -> list[tuple[str, str]]:
    found = _replayed(question)
    assert found is not None
    hours = found["hours"]
    assert isinstance(hours, float)
    lost = found["state_losses"]
    return [
        ("losses", f"{found['node_losses']} of nodes in {_duration(hours * 3600)}"),
        ("at once", f"{found['worst_in_a_group']} of a group at most; parity is {question.placement.parity}"),
        ("outcome", "all survived" if not lost else f"state lost {_count(int(str(lost)), 'time')}"),
    ]


def _interval_rows(question: Question) -> list[tuple[str, str]]:
    interval = _interval(question)
    assert interval is not None
    wasted, seconds = interval["waste"], interval["interval_s"]
    assert isinstance(wasted, float)
    assert isinstance(seconds, float)
    why = {
        "cost": "Young's interval: snapshots cost as much as the work that a loss repeats",
        "protection": "more often than that could not be protected at this link's speed",
        "snapshot": "more often than that would leave no time for training",
        "step": "every step costs less than what a loss would repeat",
    }[str(interval["limit"])]
    every = interval["every"]
    steps = "" if every is None else f"every step ({_duration(seconds)})" if every == 1 else f"every {every} steps"
    often = f"every {_duration(seconds)}" if every is None else steps
    if every is not None and every != 1:
        often += f" ({_duration(seconds)})"
    return [("interval", often), ("reason", why), ("time lost", f"{wasted:.2%}, to snapshots and repeated work")]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _gib(size_bytes: float) -> str:
    value = size_bytes / _GIB
    return f"{value:,.1f} GiB" if value >= 1 else f"{size_bytes / (1 << 20):,.1f} MiB"


def _at(seconds: float | None) -> str:
    return "" if seconds is None else f", {_duration(seconds)} at the link's speed"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _chance(probability: float) -> str:
    """A probability as people compare them: percent down to one in a thousand, then one in so many."""
    if probability < CHANCE_SHOWN_MIN:
        return f"less than 1 in {1 / CHANCE_SHOWN_MIN:,.0f}"
    if probability >= 0.001:
        return f"{probability:.2%}" if probability < 0.9999 else "almost surely"
    rarity = 1 / probability
    return f"1 in {round(rarity, 3 - len(str(int(rarity)))):,.0f}"
