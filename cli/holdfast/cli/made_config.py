"""A cluster's config that is made and not written by hand: its text, and the file that this host's daemon reads.

Covers what the makers, `slurm` and `kubernetes`, share. Memory, pages and all else are set by HOLDFAST_* in the
environment, if at all.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.cli.arguments import whole
from holdfast.protocol.config import parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.limits import NODE_COUNT_MAX
from holdfast.protocol.placement import GROUP_SIZE_MAX

ADDRESS_DEFAULT = "{host}:7400"
PARITY_DEFAULT = 2
CONFIG_NAME = "cluster.toml"


@dataclass(frozen=True, slots=True)
class MadeNode:
    """One node of a made config.

    Attributes:
        name: its slot.
        host: how the others reach its machine.
        index: what {index} of an address stands for.
        domain: what is lost together with it.
    """

    name: str
    host: str
    index: int
    domain: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a config comes from.

    Attributes:
        made_from: for people, such as "a Slurm allocation".
        cluster: the cluster's name.
        epoch: the cluster's epoch.
    """

    made_from: str
    cluster: str
    epoch: int = 1


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all commands take that make a config."""
    add = parser.add_argument
    add(
        "--slots",
        type=whole(1, NODE_COUNT_MAX),
        metavar="N",
        help="nodes of the cluster: of Slurm's hosts, the others are spares [all]; a StatefulSet's replicas [needed]",
    )
    add("--parity", type=whole(0, GROUP_SIZE_MAX - 1), metavar="M", help=f"losses to survive [{PARITY_DEFAULT}]")
    add(
        "--address",
        default=ADDRESS_DEFAULT,
        metavar="T",
        help="from {host}, {index}; e.g. {host}-ib:7400 [{host}:7400]",
    )
    add("--keys-dir", type=Path, metavar="D", help="folder of the keys; needed unless all is loopback")
    add("--dir", type=Path, metavar="D", help="this host's folder for config and sockets [a folder in TMPDIR]")


def config_text(
    nodes: Sequence[MadeNode], source: Source, *, parity: int | None, address: str, keys_dir: str | None
) -> str:
    """The text of a config with these nodes.

    Args:
        nodes: in the order of the slots.
        source: what it is made from, and what the cluster is called.
        parity: as asked for, None: PARITY_DEFAULT, or what so few nodes allow.
        address: a template with {host} and {index}.
        keys_dir: the folder of the keys, if there are any.

    Raises:
        OperatorError: `address` is no template (exit code 2).
        ConfigError: what results is no config.
    """
    lines = [
        f"# Made by holdfast from {source.made_from}.",
        "[cluster]",
        f'name = "{source.cluster}"',
        f"parity = {min(PARITY_DEFAULT, len(nodes) - 1) if parity is None else parity}",
        f"epoch = {source.epoch}",
    ]
    if keys_dir is not None:
        lines += ["[security]", f'keys_dir = "{keys_dir}"']
    for node in nodes:
        try:
            place = address.format(host=node.host, index=node.index)
        except (KeyError, IndexError, ValueError) as error:
            raise OperatorError(
                ExitCode.USAGE, f"--address: expected a text with {{host}} or {{index}}, found {address!r}"
            ) from error
        lines += ["[[node]]", f'name = "{node.name}"', f'address = "{place}"', f'domain = "{node.domain}"']
    text = "\n".join(lines) + "\n"
    parse_config(text, origin=source.made_from, environment={})
    return text


def keys_dir_of(args: argparse.Namespace) -> str | None:
    """The folder of the keys as a command was given it, absolute."""
    return None if args.keys_dir is None else str(args.keys_dir.absolute())


def write_config(folder: Path, host: str, text: str) -> Path:
    """Put the config where this host's daemon reads it, whole or not at all. Returns its path.

    Raises:
        OperatorError: the folder is not ours, or can't be written (exit code 2).
    """
    file = folder / f"{host}-{CONFIG_NAME}"
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"it belongs to user {folder.stat().st_uid}")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    except OSError as error:
        raise OperatorError(
            ExitCode.USAGE, f"can't write the config to {folder}: {error}; give --dir a folder of your own"
        ) from error
    return file
