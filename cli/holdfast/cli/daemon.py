"""`holdfast daemon`: become the keeper of one node, which starts the worker.

Covers finding the config, the node and the socket. The daemon's room is started by module name, never imported.
"""

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.cli.arguments import Subparsers
from holdfast.cli.config import read_config
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.trust import refuse_exposure

KEEPER = "holdfast.daemon.keeper"


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("daemon", help="run one node: keeper and worker")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the cluster's config")
    parser.add_argument("--node", metavar="NAME", help="which node of the config this is; default: by host name")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the Unix socket for trainers and commands")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked here, then become the keeper. Returns only by an error."""
    config = read_config(args.config).config
    node = args.node or node_of_host(config, _host_names())
    if node not in [known.name for known in config.nodes]:
        names = ", ".join(known.name for known in config.nodes)
        raise OperatorError(ExitCode.USAGE, f"--node: expected one of {names}, found {node!r}")
    refuse_exposure(config)
    path = (args.socket or socket_of(config, node, os.environ)).absolute()
    command = keeper_command(args.config.absolute(), node, path)
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606  # our own interpreter, no shell


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
