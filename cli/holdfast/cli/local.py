"""`holdfast local`: a cluster of daemons on this machine, for trying things out and for developing against.

Covers the verb: where the files are, what is printed, and running until asked to stop. The cluster is `cluster`'s.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from holdfast.cli import cluster as clusters
from holdfast.cli.arguments import Subparsers, whole
from holdfast.cli.cluster import Cluster
from holdfast.cli.interruption import StopAskedError, ending_signals_raise, ending_signals_wait
from holdfast.cli.output import emit, table
from holdfast.protocol.exit_codes import ExitCode, OperatorError

NODES_MAX = 64  # of one machine; each is two processes of about 80 MiB
PARITY_DEFAULT, GROUP_SIZE = 2, 8
MEMORY_SHARE = 0.5  # of the machine's free memory that all daemons together may hold
CHUNK_BYTES = 1 << 20
WATCH_S = 0.5  # between two looks whether a daemon has ended


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "local", help="a cluster of daemons on this machine, until interrupted; prints each node's socket"
    )
    parser.add_argument("--nodes", type=whole(1, NODES_MAX), required=True, metavar="N", help="how many daemons")
    parser.add_argument(
        "--parity",
        type=whole(0, NODES_MAX - 1),
        metavar="M",
        help=f"node losses to survive; default: {PARITY_DEFAULT}, or fewer where there are too few nodes",
    )
    parser.add_argument(
        "--dir", type=Path, metavar="D", help="folder for config, keys, logs and sockets; one from before is used again"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON when all are up")


def run(args: argparse.Namespace) -> int:
    """Start the daemons, say where they are, run until asked to stop."""
    if args.parity is not None and args.parity >= args.nodes:
        raise OperatorError(
            ExitCode.USAGE,
            f"--parity: expected less than the {args.nodes} nodes, found {args.parity}; with {args.nodes - 1}, "
            "the loss of all nodes but one is survived",
        )
    temporary = Path(tempfile.mkdtemp(prefix="holdfast-")) if args.dir is None else None
    try:
        with ending_signals_raise():
            cluster = _cluster(args, temporary or args.dir.absolute())
            return _serve(cluster, as_json=args.json)
    except StopAskedError:
        return int(ExitCode.DONE)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _cluster(args: argparse.Namespace, folder: Path) -> Cluster:
    """A new cluster, or the one that is in the folder already."""
    if (folder / clusters.CONFIG_NAME).exists():
        cluster = clusters.reopen(folder)
        _refuse_other_shape(args, cluster)
        return cluster
    clusters.refuse_long_path(folder / f"n{args.nodes - 1}" / clusters.SOCKET_NAME)
    parity = min(PARITY_DEFAULT, args.nodes - 1) if args.parity is None else args.parity
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(ExitCode.USAGE, f"can't make the folder {folder}: {error}; give --dir another") from error
    return clusters.create(
        folder,
        node_count=args.nodes,
        parity=parity,
        group_size=max(GROUP_SIZE, parity + 1),
        memory_share=MEMORY_SHARE,
        chunk_bytes=CHUNK_BYTES,
    )


def _refuse_other_shape(args: argparse.Namespace, cluster: Cluster) -> None:
    found = (len(cluster.nodes), cluster.config.parity)
    expected = (args.nodes, cluster.config.parity if args.parity is None else args.parity)
    if found != expected:
        raise OperatorError(
            ExitCode.USAGE,
            f"{cluster.config_file} is of {found[0]} nodes with parity {found[1]}, asked for {expected[0]} with parity "
            f"{expected[1]}; give --nodes {found[0]} --parity {found[1]}, or --dir another folder",
        )


def _serve(cluster: Cluster, *, as_json: bool) -> int:
    with cluster:
        try:
            cluster.start(cluster.nodes)
            cluster.wait_up()
            _announce(cluster, as_json=as_json)
            _watch(cluster)
        finally:
            with ending_signals_wait():
                for name in cluster.stop():
                    sys.stderr.write(f"node {name} did not stop within {clusters.STOP_S} s and was killed\n")
    return int(ExitCode.DONE)


def _announce(cluster: Cluster, *, as_json: bool) -> None:
    nodes = [
        {"name": node.name, "socket": str(node.socket), "address": node.address, "pid": cluster.keeper_pid(node.name)}
        for node in cluster.nodes.values()
    ]
    if as_json:
        fields = {"dir": str(cluster.folder), "config": str(cluster.config_file), "nodes": nodes}
        emit(json.dumps({"schema": "holdfast.local/1", **fields}))
    else:
        rows = [[str(node[key]) for key in ("name", "socket", "address", "pid")] for node in nodes]
        emit(table(["node", "socket", "address", "keeper"], rows, indent=""))
        emit(f"\nexport HOLDFAST_SOCKET={cluster.sockets}\n")
        emit("Press Ctrl-C to stop all of them.")
    sys.stdout.flush()


def _watch(cluster: Cluster) -> None:
    """Run until a signal; says once of each daemon that it ended for good.

    Raises:
        OperatorError: none is left.
    """
    said: set[str] = set()
    while len(said) < len(cluster.nodes):
        for name, code in cluster.ended().items():
            if name not in said:
                said.add(name)
                sys.stderr.write(f"node {name} ended for good with status {code}; {cluster.log_hint(name)}\n")
        time.sleep(WATCH_S)
    raise OperatorError(ExitCode.UNREACHABLE, "all daemons have ended; see above, then start again")
