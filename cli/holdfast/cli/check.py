"""`holdfast check`: one line and an exit code for monitors: 0 ok, 1 warning, 2 critical, 3 unknown."""

import argparse
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import Subparsers, add_json_flag
from holdfast.cli.link import Daemon, default_socket
from holdfast.cli.output import emit, emit_json
from holdfast.cli.status import headline
from holdfast.protocol.exit_codes import OperatorError

# The monitors' convention, not ExitCode: this verb speaks to Nagios and its heirs.
CODES = {"HEALTHY": (0, "OK"), "DEGRADED": (1, "WARNING"), "UNPROTECTED": (2, "CRITICAL"), "LOST": (2, "CRITICAL")}
UNKNOWN = (3, "UNKNOWN")


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "check",
        help="for monitors: exit 0 ok, 1 warning, 2 critical, 3 unknown",
        epilog="Exit codes as monitors want them.",
    )
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon to ask; default: HOLDFAST_SOCKET")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Ask and judge."""
    try:
        with Daemon(args.socket or default_socket()) as daemon:
            code, fields = judge(daemon.complete_status())
    except OperatorError as error:
        code, fields = UNKNOWN[0], {"state": UNKNOWN[1], "text": str(error)}
    if args.json:
        emit_json("holdfast.check/1", {"exit_code": code, **fields})
    else:
        emit(f"HOLDFAST {fields['state']} - {fields['text']}")
    return code


def judge(status: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The exit code for a status, and what to say."""
    code, state = CODES.get(status["verdict"], UNKNOWN) if status["complete"] else UNKNOWN
    text = " ".join(headline(status).split())
    failing = [job for job in status.get("jobs", ()) if (job.get("durable") or {}).get("failures")]
    if failing:
        if code == 0:
            code, state = CODES["DEGRADED"]
        told = failing[0]
        text += f"; no durable copy of job {told['name']}: {told['durable']['problem']}"
    return code, {"state": state, "text": text, "verdict": status["verdict"], "more_losses": status["more_losses"]}
