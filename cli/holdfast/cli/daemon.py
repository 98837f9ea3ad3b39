"""`holdfast daemon`: become the keeper of one node, which starts the worker.

Covers finding the config, the node and the socket, also from a Slurm allocation or a StatefulSet. The daemon's room is
started by module name, never imported.

"""

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.cli import kubernetes, made_config, slurm
from holdfast.cli.arguments import Subparsers
from holdfast.cli.config import read_config
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.trust import refuse_exposure

KEEPER = "holdfast.daemon.keeper"


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("daemon", help="run one node: keeper and worker")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE", help="the cluster's config")
    source.add_argument("--from-slurm", action="store_true", help="make the config from the Slurm job's hosts")
    source.add_argument(
        "--from-kubernetes", action="store_true", help="make the config for the pods of this pod's StatefulSet"
    )
    parser.add_argument("--node", metavar="NAME", help="which node of the config this is; default: by host name")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the Unix socket for trainers and commands")
    made_config.add_options(parser)
    slurm.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked here, then become the keeper. Returns only by an error or for a spare."""
    if args.from_slurm and not _take_slurm(args):
        return int(ExitCode.DONE)
    if args.from_kubernetes:
        _take_kubernetes(args)
    command = _command(args)
    sys.stdout.flush()
    return os.execv(command[0], command)  # noqa: S606  # our own interpreter, no shell


def _command(args: argparse.Namespace) -> list[str]:
    """The keeper's command line, once nothing more can be refused here."""
    config = read_config(args.config).config
    node = args.node or node_of_host(config, _host_names())
    if node not in [known.name for known in config.nodes]:
        names = ", ".join(known.name for known in config.nodes)
        raise OperatorError(ExitCode.USAGE, f"--node: expected one of {names}, found {node!r}")
    refuse_exposure(config)
    path = (args.socket or socket_of(config, node, os.environ)).absolute()
    return keeper_command(args.config.absolute(), node, path)


def _take_slurm(args: argparse.Namespace) -> bool:
    """Write the config of the Slurm allocation and name this host's node and socket. False: this host is a spare."""
    allocation = slurm.read_allocation(os.environ, host=_host_names()[-1])
    text, assigned = slurm.text_of(args, allocation)
    if allocation.own not in assigned:
        sys.stderr.write(f"{allocation.own} is a spare of job {allocation.job_id}: no daemon is needed here yet\n")
        return False
    folder = slurm.folder_of(args, allocation)
    args.config = made_config.write_config(folder, allocation.own, text)
    args.node = args.node or f"n{assigned.index(allocation.own)}"
    args.socket = args.socket or folder / slurm.socket_name(allocation.own)
    return True


def _take_kubernetes(args: argparse.Namespace) -> None:
    """Write the config of the StatefulSet, name this pod's node, and wait until its address is known."""
    pod = kubernetes.read_pod(os.environ, host=_host_names()[-1])
    if args.without:
        raise OperatorError(
            ExitCode.USAGE, "--without: expected none with --from-kubernetes, which replaces pods itself"
        )
    text = kubernetes.text_of(args, pod)
    args.node = args.node or f"{pod.stateful_set}-{pod.ordinal}"
    args.config = made_config.write_config(kubernetes.folder_of(args, pod), args.node, text)
    config = read_config(args.config).config
    refuse_exposure(config)
    kubernetes.wait_for_own_name(config, args.node)


def keeper_command(config_file: Path, node: str, socket_path: Path) -> list[str]:
    """The command line of a node's keeper."""
    worker = ["--config", str(config_file), "--node", node, "--socket", str(socket_path)]
    return [sys.executable, "-m", KEEPER, "--", *worker]


def socket_of(config: ClusterConfig, node: str, environment: Mapping[str, str]) -> Path:
    """Where a node's socket goes: as configured, else /run/holdfast if writable, else the runtime folder."""
    configured = config.socket_of(node)
    if configured is not None:
        return Path(configured)
    system = Path("/run/holdfast")
    if os.access(system if system.exists() else system.parent, os.W_OK):
        return system / "holdfast.sock"
    runtime = environment.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "holdfast" / "holdfast.sock"
    raise OperatorError(
        ExitCode.USAGE,
        "no place for the socket: /run/holdfast can't be written and XDG_RUNTIME_DIR is not set; give --socket",
    )


def node_of_host(config: ClusterConfig, host_names: Sequence[str]) -> str:
    """The node whose name or address is this host.

    Raises:
        OperatorError: none is, or several are.
    """
    if len(config.nodes) == 1:
        return config.nodes[0].name
    found = [node.name for node in config.nodes if node.name in host_names or node.host in host_names]
    if len(found) != 1:
        raise OperatorError(
            ExitCode.USAGE,
            f"expected one node of the config to be this host ({', '.join(host_names)}), found "
            f"{', '.join(found) or 'none'}; give --node NAME",
        )
    return found[0]


def _host_names() -> list[str]:
    name = socket.gethostname()
    return list(dict.fromkeys([name, name.partition(".")[0]]))
