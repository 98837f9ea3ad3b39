"""`holdfast trace`: the last snapshots and recoveries of all nodes as one Chrome trace.

Covers asking; how clocks are aligned is in `clocks`, how the trace looks in `chrome_trace`. Nodes that don't answer are
named, and missing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.arguments import Subparsers, add_json_flag, whole
from holdfast.cli.chrome_trace import Remembered, chrome_trace, summary
from holdfast.cli.clocks import offset
from holdfast.cli.link import Daemon, default_socket
from holdfast.cli.output import emit
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.trace import TraceAnswer

CLOCK_QUESTIONS = 5  # of each node, for its clock alone: the quickest answer counts
SNAPSHOTS = 8  # shown unless told otherwise
SNAPSHOTS_MAX = 10_000  # more than a node remembers


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("trace", help="a Chrome trace of the last snapshots and recoveries, on all nodes")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon to ask; default: HOLDFAST_SOCKET")
    parser.add_argument(
        "--last", type=whole(1, SNAPSHOTS_MAX), default=SNAPSHOTS, metavar="N", help="snapshots of each node (8)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to; default: stdout")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Ask all nodes and write what they say. The output is JSON with and without --json."""
    with Daemon(args.socket or default_socket()) as daemon:
        status = daemon.status()
        names = [str(node["name"]) for node in status["nodes"]]
        nodes, missing = collect(daemon, names, args.last)
    text = json.dumps(chrome_trace(nodes, cluster=str(status["cluster"]), missing=missing), allow_nan=False)
    if args.out is None:
        emit(text)
    else:
        try:
            args.out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OperatorError(ExitCode.USAGE, f"--out {args.out} can't be written: {error}; name another") from error
    sys.stderr.write(f"holdfast: {summary(nodes, missing=missing, asked=names)}\n")
    return int(ExitCode.DONE)


def collect(daemon: Daemon, names: Sequence[str], newest: int) -> tuple[list[Remembered], dict[str, str]]:
    """Ask every node, first several times for its clock; returns what they remember, who did not answer, and why."""
    answers: dict[int, list[TraceAnswer]] = {node: [] for node in range(len(names))}
    missing: dict[str, str] = {}
    for question in range(CLOCK_QUESTIONS + 1):
        asked = [node for node, name in enumerate(names) if name not in missing]
        for answer in daemon.traces(asked, newest if question == CLOCK_QUESTIONS else 0):
            answers[answer.node].append(answer)
            if answer.trace is None:
                missing[names[answer.node]] = answer.problem
    found = []
    for node, name in enumerate(names):
        ahead, last = offset(answers[node]), answers[node][-1].trace
        if name not in missing and ahead is not None and last is not None:
            found.append(Remembered(node, name, last, ahead))
    return found, missing
