"""`holdfast drill`: prove now, on live data, that what is committed can be rebuilt.

Covers asking, waiting and telling; the daemons drill. Exit codes: 0 proven; 3 nothing is committed or more is lost than
parity covers; 4 the nodes did not end their drills in time; 6 something that was rebuilt was not what it should be.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import Subparsers, add_json_flag, whole
from holdfast.cli.link import Daemon, default_socket
from holdfast.cli.output import emit, emit_json
from holdfast.protocol import limits
from holdfast.protocol.exit_codes import ExitCode, OperatorError

LOOK_S = 0.2  # between two looks at the status
SETTLE_S = 3.0  # for word of a commit to have come from everybody: it travels with heartbeats
DEADLINE_S = 60.0  # without a node that ends its drill for so long, the command gives up

GIB = 1 << 30


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("drill", help="prove on live data that what is committed can be rebuilt")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon to ask; default: HOLDFAST_SOCKET")
    parser.add_argument(
        "--stripes",
        type=whole(1, limits.DRILL_STRIPES_MAX),
        default=limits.DRILL_STRIPES,
        metavar="N",
        help=f"stripes sampled on each node; default: {limits.DRILL_STRIPES}",
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Ask for a drill, wait for its end, tell."""
    with Daemon(args.socket or default_socket()) as daemon:
        before = _counts(_settled(daemon))
        if not before:
            raise OperatorError(
                ExitCode.NOT_RECOVERABLE, "no job has committed a snapshot: there is nothing to drill yet"
            )
        daemon.drill(args.stripes)
        status = _wait(daemon, before)
    rows = [job for job in status["jobs"] if job["committed_step"] is not None]
    code = max((_code(job) for job in rows), default=ExitCode.NOT_RECOVERABLE)
    if args.json:
        jobs = [{"name": job["name"], "committed_step": job["committed_step"], **(job["drill"] or {})} for job in rows]
        emit_json("holdfast.drill/1", {"exit_code": int(code), "jobs": jobs})
    else:
        for job in rows:
            emit(describe(job))
    return int(code)


def describe(job: dict[str, Any]) -> str:
    """What was proven of a job, in a line."""
    found = job["drill"]
    if not found or found["proven_step"] is None:
        problem = (found or {}).get("problem") or job["reason"] or "no drill has ended yet"
        return f"job {job['name']}: NOT proven: {problem}"
    rate = f", rebuild {_rate(found['rebuild_bytes_per_s'])}" if found["rebuild_bytes_per_s"] else ""
    losses = {0: "no further loss", 1: "any 1 loss"}.get(found["survives"], f"any {found['survives']} losses")
    text = f"job {job['name']}: step {found['proven_step']} survives {losses}, proven {found['age_s']:.0f} s ago{rate}"
    text += f" ({found['stripes']} stripes, {found['patterns']} patterns, {found['columns']} columns by reedsolo)"
    return text + (f"; then a drill failed: {found['problem']}" if found["failures"] else "")


def _rate(bytes_per_s: int) -> str:
    return f"{bytes_per_s / GIB:.2f} GiB/s" if bytes_per_s >= GIB else f"{bytes_per_s / (1 << 20):.1f} MiB/s"


def _code(job: dict[str, Any]) -> ExitCode:
    found = job["drill"]
    if job["verdict"] == "LOST" or not found:
        return ExitCode.NOT_RECOVERABLE
    if found["failures"]:
        return ExitCode.BAD_DIGEST
    return ExitCode.DONE if found["proven_step"] is not None else ExitCode.NOT_RECOVERABLE


def _counts(status: dict[str, Any]) -> dict[tuple[str, str], int]:
    """How many drills each live node has ended of each job of which it holds a committed step."""
    return {
        (node["name"], job): held["drill"]["drills"]
        for node in status["nodes"]
        if node["state"] == "up"
        for job, held in node["jobs"].items()
        if held["committed_step"] is not None and held["whole"]
    }


def _settled(daemon: Daemon) -> dict[str, Any]:
    """The status once every live node that takes part in what is committed was heard to hold it, or `SETTLE_S` later.

    A node that is being rebuilt holds nothing yet: the drill goes on without it.
    """
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        status = daemon.status()
        held = _counts(status)
        up = {node["name"] for node in status["nodes"] if node["state"] == "up"}
        committed = [job for job in status["jobs"] if job["committed_step"] is not None]
        settled = all(
            job["participants"] is not None
            and all((name, job["name"]) in held for name in up.intersection(job["participants"]))
            for job in committed
        )
        if settled or time.monotonic() > deadline_s:
            return status
        time.sleep(LOOK_S)


def _wait(daemon: Daemon, before: dict[tuple[str, str], int]) -> dict[str, Any]:
    """Wait until every node that drills has ended one drill more; nodes that go away meanwhile are not waited for."""
    last, moved_s, asked_s = -1, time.monotonic(), time.monotonic()
    while True:
        status = daemon.status()
        now = _counts(status)
        left = [key for key, count in before.items() if key in now and now[key] <= count]
        if not left:
            return status
        if len(left) != last:
            last, moved_s = len(left), time.monotonic()
            if sys.stderr.isatty():
                sys.stderr.write(f"\r\x1b[K{len(before) - len(left)} of {len(before)} drills have ended")
        elif time.monotonic() - moved_s > DEADLINE_S:
            names = ", ".join(sorted({node for node, _ in left}))
            raise OperatorError(
                ExitCode.UNREACHABLE, f"no drill ended within {DEADLINE_S} s on {names}; see their logs"
            )
        if time.monotonic() - asked_s > limits.CHUNK_DEADLINE_S / 2:  # the wish may have been lost on its way
            daemon.drill(limits.DRILL_STRIPES)
            asked_s = time.monotonic()
        time.sleep(LOOK_S)
