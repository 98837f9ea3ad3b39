"""A cluster's config from what Slurm says of a job's allocation: which host has which slot.

Covers the list of hosts and spares; the text is `made_config`'s, starting daemons is `daemon`'s, and how a batch script
puts it together is in deploy/slurm. Sources: slurm's hostlist notation; srun(1) and sbatch(1), output environment
variables.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.cli import made_config
from holdfast.cli.made_config import MadeNode, Source
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.limits import NODE_COUNT_MAX

_PART = re.compile(r"([^\[\],]+)|\[([^\[\]]+)\]")  # plain letters, or ranges in brackets
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What Slurm says of the job and of this host.

    Attributes:
        job_id: as Slurm counts.
        hosts: all hosts of the allocation, in Slurm's order.
        own: this host's name in that list.
        restarts: how often the job was requeued.
    """

    job_id: str
    hosts: tuple[str, ...]
    own: str
    restarts: int = 0


def expand(hostlist: str) -> list[str]:
    """The hosts of a list in Slurm's notation: "n[1-3,7],login" -> n1 n2 n3 n7 login. Leading zeros are kept.

    Raises:
        ValueError: it is no such list, or names more than NODE_COUNT_MAX hosts; with words that follow "expected".
    """
    found: list[str] = []
    for entry in _entries(hostlist):
        names = [""]
        position = 0
        for part in _PART.finditer(entry):
            if part.start() != position:
                break
            position = part.end()
            choices = [part[1]] if part[1] is not None else _numbers(part[2], hostlist)
            if len(names) * len(choices) > NODE_COUNT_MAX:
                raise ValueError(f"at most {NODE_COUNT_MAX} hosts, found more in {hostlist[:80]!r}")
            names = [name + choice for name in names for choice in choices]
        if position != len(entry) or not entry:
            raise ValueError(f"a list of hosts such as n[1-4,7],login, found {hostlist[:80]!r}")
        found += names
    if len(found) > NODE_COUNT_MAX:
        raise ValueError(f"at most {NODE_COUNT_MAX} hosts, found {len(found)}")
    return found


def _entries(hostlist: str) -> list[str]:
    """The list at the commas outside of brackets."""
    entries, depth = [""], 0
    for letter in hostlist:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += letter
    return entries


def _numbers(ranges: str, hostlist: str) -> list[str]:
    numbers: list[str] = []
    for text in ranges.split(","):
        found = _RANGE.fullmatch(text)
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if found is None or high < low or high - low >= NODE_COUNT_MAX:
            raise ValueError(f"ranges such as [1-4,7] in a list of hosts, found [{ranges}] in {hostlist[:80]!r}")
        numbers += [f"{number:0{len(found[1])}d}" for number in range(low, high + 1)]
    return numbers


def read_allocation(environment: Mapping[str, str], *, host: str) -> Allocation:
    """The allocation as the environment of a batch script, step or prolog tells it.

    Raises:
        OperatorError: this is no Slurm job, or its list of hosts can't be read (exit code 2).
    """
    # In a prolog the list has the second name.
    listed = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    job_id = environment.get("SLURM_JOB_ID")
    if not listed or not job_id:
        raise OperatorError(
            ExitCode.USAGE,
            "expected SLURM_JOB_ID and SLURM_JOB_NODELIST in the environment, found no Slurm job; run this under srun "
            "or sbatch, or give --config FILE",
        )
    try:
        hosts = expand(listed)
    except ValueError as error:
        raise OperatorError(ExitCode.USAGE, f"SLURM_JOB_NODELIST: expected {error}") from error
    own = environment.get("SLURMD_NODENAME") or host
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    return Allocation(job_id=job_id, hosts=tuple(hosts), own=own, restarts=int(restarts) if restarts.isdecimal() else 0)


def assign(hosts: Sequence[str], *, slots: int | None, without: Sequence[str]) -> list[str]:
    """The host of each slot: the first `slots` hosts, and for each that is lost the next spare.

    Everybody who calls this with the same arguments gets the same answer, and a host that is not lost keeps its slot
    whatever is lost later, as long as `without` only grows at its end.

    Raises:
        OperatorError: more slots than hosts, an unknown host, or no spare left (exit code 2).
    """
    count = len(hosts) if slots is None else slots
    if count > len(hosts):
        raise OperatorError(ExitCode.USAGE, f"--slots: expected at most the {len(hosts)} hosts, found {count}")
    strangers = [name for name in without if name not in hosts]
    if strangers:
        raise OperatorError(
            ExitCode.USAGE, f"--without: expected hosts of the allocation ({', '.join(hosts)}), found {strangers[0]!r}"
        )
    taken, spares = list(hosts[:count]), list(hosts[count:])
    for lost in without:
        if lost in spares:
            spares.remove(lost)
        elif lost in taken:
            if not spares:
                raise OperatorError(
                    ExitCode.NOT_RECOVERABLE,
                    f"no spare host is left for the slot of {lost}: {len(hosts)} hosts, {count} slots, lost "
                    f"{', '.join(without)}. Ask Slurm for more nodes than slots",
                )
            taken[taken.index(lost)] = spares.pop(0)
    return taken


def config_text(
    allocation: Allocation, assigned: Sequence[str], *, parity: int | None, address: str, keys_dir: str | None
) -> str:
    """The config of this allocation.

    Raises:
        OperatorError: `address` is no template (exit code 2).
        ConfigError: what results is no config.
    """
    nodes = [MadeNode(f"n{slot}", host, allocation.hosts.index(host), host) for slot, host in enumerate(assigned)]
    source = Source("a Slurm allocation", f"slurm-{allocation.job_id}", allocation.restarts + 1)
    return made_config.config_text(nodes, source, parity=parity, address=address, keys_dir=keys_dir)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only Slurm's configs take."""
    parser.add_argument(
        "--without", default="", metavar="HOST,...", help="hosts that were lost, in this order; spares take their slots"
    )


def text_of(args: argparse.Namespace, allocation: Allocation) -> tuple[str, list[str]]:
    """The config for a command's options, and the host of each slot."""
    lost = [name for name in args.without.split(",") if name]
    assigned = assign(allocation.hosts, slots=args.slots, without=lost)
    keys_dir = made_config.keys_dir_of(args)
    text = config_text(allocation, assigned, parity=args.parity, address=args.address, keys_dir=keys_dir)
    return text, assigned


def folder_of(args: argparse.Namespace, allocation: Allocation) -> Path:
    """This job's folder on a host: config and sockets."""
    given: Path | None = args.dir
    return given or Path(tempfile.gettempdir()) / f"holdfast-{os.getuid()}-{allocation.job_id}"


def socket_name(host: str) -> str:
    """The name of a host's socket in that folder, as a batch script says it: $SLURMD_NODENAME.sock."""
    return f"{host}.sock"
