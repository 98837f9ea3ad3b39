"""`holdfast forget`: free all memory that a job holds, on every node."""

import argparse
from pathlib import Path

from holdfast.cli.arguments import Subparsers
from holdfast.cli.link import Daemon, default_socket
from holdfast.cli.output import emit
from holdfast.protocol.exit_codes import ExitCode, OperatorError


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("forget", help="free all memory that a finished job holds, on every node")
    parser.add_argument("job", metavar="JOB", help="the job's name")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon to ask; default: HOLDFAST_SOCKET")


def run(args: argparse.Namespace) -> int:
    """Forget a job that no rank uses."""
    with Daemon(args.socket or default_socket()) as daemon:
        rows = {job["name"]: job for job in daemon.status()["jobs"]}
        if args.job not in rows:
            raise OperatorError(ExitCode.USAGE, f"no job is named {args.job!r}; known: {', '.join(rows) or 'none'}")
        if rows[args.job]["ranks"]:
            raise OperatorError(
                ExitCode.USAGE, f"job {args.job} has {rows[args.job]['ranks']} ranks attached; stop them first"
            )
        daemon.forget(args.job)
    emit(f"job {args.job}: forgotten, its memory is free on every node that is up")
    return int(ExitCode.DONE)
