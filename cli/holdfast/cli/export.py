"""`holdfast export`: a committed step as a torch checkpoint directory, readable without Holdfast.

Covers finding the job and starting the process that does it: that one imports torch, the command line never does.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from holdfast.cli.arguments import Subparsers, add_json_flag, whole
from holdfast.cli.link import Daemon, default_socket
from holdfast.cli.output import emit, emit_json
from holdfast.cli.status import mib
from holdfast.protocol import limits
from holdfast.protocol.exit_codes import ExitCode, OperatorError

EXPORTER = "holdfast.client.export"


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write a committed step as a torch checkpoint directory, readable without Holdfast",
        epilog="torch.distributed.checkpoint.load reads the directory; nodes may be missing while it is written.",
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="a new or empty directory, or s3://BUCKET/PREFIX (gs, az)"
    )
    parser.add_argument("--step", type=whole(0, limits.STEP_MAX), metavar="S", help="the step that it must be")
    parser.add_argument("--job", metavar="NAME", help="whose state; needed where there are several jobs")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon to ask; default: HOLDFAST_SOCKET")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Find the job, have it written, tell."""
    path = args.socket or default_socket()
    with Daemon(path) as daemon:
        job = _job([row["name"] for row in daemon.status()["jobs"]], args.job)
    to = args.to if "://" in args.to else str(Path(args.to).absolute())
    command = [sys.executable, "-m", EXPORTER, "--job", job, "--to", to, "--socket", str(path)]
    if args.step is not None:
        command += ["--step", str(args.step)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        return ended.returncode  # it has said why, on stderr
    told = json.loads(ended.stdout)
    if args.json:
        emit_json("holdfast.export/1", told)
    else:
        emit(f"job {job}: step {told['step']} is in {told['directory']}: {mib(told['size_bytes'])} in "
             f"{told['seconds']:.1f} s; torch.distributed.checkpoint.load reads it")  # fmt: skip
    return int(ExitCode.DONE)


def _job(known: list[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in known:
            listed = ", ".join(known) or "none"
            raise OperatorError(ExitCode.USAGE, f"--job: expected one of {listed}, found {wanted!r}")
        return wanted
    if not known:
        raise OperatorError(ExitCode.NOT_RECOVERABLE, "no job is known here: there is nothing to export")
    if len(known) > 1:
        raise OperatorError(ExitCode.USAGE, f"--job: expected a name, several jobs are known: {', '.join(known)}")
    return known[0]
