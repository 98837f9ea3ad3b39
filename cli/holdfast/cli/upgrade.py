"""`holdfast upgrade`: replace this node's worker by one that reads code, config and keys again, and lose nothing.

The keeper goes on and holds the memory meanwhile. Covers asking first whether the new worker would start at all, the
exchange, and whether everything is still there afterwards. What the keeper itself is made of stays as it was.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from holdfast.cli import processes
from holdfast.cli.arguments import Subparsers, add_json_flag
from holdfast.cli.link import Daemon, default_socket
from holdfast.cli.output import emit, emit_json
from holdfast.protocol.config import parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError

WORKER = "holdfast.daemon.shell.worker"
CHECK_S = 30.0  # the trial start of a new worker: imports, config, keys
BACK_S = 30.0  # from the request until the new worker answers; a second where nothing is in flight
LOOK_S = 0.1


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "upgrade",
        help="replace this node's worker (new code, config, keys); every snapshot stays",
        description="Replace this node's worker by one that reads code, config and keys again. Every snapshot stays. "
        "Give it on one node after the other; training goes on.",
    )
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the node's daemon; default: HOLDFAST_SOCKET")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Check, exchange, compare."""
    path = args.socket or default_socket()
    with Daemon(path) as daemon:
        name, pid, status = daemon.welcome.node_name, daemon.pid, daemon.status()
    before = _row_of(status, name)
    refuse_worse(pid)
    if _steps(before) or status.get("earlier"):
        refuse_other_cluster(pid, status)
    try:
        os.kill(pid, signal.SIGHUP)
    except OSError as error:
        raise OperatorError(
            ExitCode.UNREACHABLE,
            f"expected to signal the worker (process {pid}) of node {name}: {error.strerror}. Run this as the daemon's "
            "user, on its host and inside its container",
        ) from error
    after = _wait_back(path, name=name, session=before["worker_session"])
    missing = lost(before, after)
    fields = {"node": name, "session": after["worker_session"], "held": _steps(after), "missing": missing}
    if args.json:
        emit_json("holdfast.upgrade/1", fields)
    else:
        held = ", ".join(f"{job} step {step}" for job, step in _steps(after).items()) or "nothing"
        emit(f"node {name}: worker session {before['worker_session']} -> {after['worker_session']}, holds {held}")
    if missing:
        sys.stderr.write(f"no longer held: {', '.join(missing)}; 'holdfast recover' rebuilds it from the others\n")
        return int(ExitCode.NOT_RECOVERABLE)
    return int(ExitCode.DONE)


def refuse_worse(pid: int) -> None:
    """Try whether a new worker would start with the running one's arguments and environment.

    Raises:
        OperatorError: it would not; with its own words and exit code. The running worker is not touched.
    """
    words = processes.arguments(pid)
    if WORKER not in words:
        raise OperatorError(
            ExitCode.UNREACHABLE,
            f"process {pid} is no worker that this command can see; run it on the daemon's host, inside its container",
        )
    given = [word for word in words[words.index(WORKER) + 1 :] if word]
    tried = subprocess.run(
        [words[0], "-m", WORKER, *given, "--check"],
        env=processes.environment(pid), capture_output=True, text=True, timeout=CHECK_S, check=False,
    )  # fmt: skip
    if tried.returncode:
        code = ExitCode(tried.returncode) if tried.returncode in set(ExitCode) else ExitCode.BUG
        said = tried.stderr.strip() or f"status {tried.returncode}"
        raise OperatorError(code, f"a new worker would not start, so the running one stays: {said}")


def refuse_other_cluster(pid: int, status: dict[str, Any]) -> None:
    """Refuse a config under which a new worker would not take up the snapshots that this node holds.

    A higher epoch of the same cluster is taken up beside what is held, one at a time.

    Raises:
        OperatorError: cluster, epoch, parity or groups are others now (exit code 5), or an earlier change is still
            under way. The running worker is not touched.
    """
    words = processes.arguments(pid)
    file = Path(words[words.index("--config") + 1])
    config = parse_config(
        file.read_text(encoding="utf-8"), origin=str(file), environment=processes.environment(pid)
    ).config
    groups = [[config.nodes[node].name for node in group] for group in config.placement().groups]
    given = {"cluster": config.cluster_name, "epoch": config.epoch, "parity": config.parity, "groups": groups}
    grows = config.cluster_name == status["cluster"] and config.epoch > status["epoch"]
    if grows and status.get("earlier"):
        under_way = status["earlier"]
        raise OperatorError(
            ExitCode.WRONG_CLUSTER,
            f"expected the change to epoch {status['epoch']} to be over before another one begins, found jobs that "
            f"have not moved yet: {', '.join(under_way['waits_for'])}. Start them again, or give them up with "
            "'holdfast forget JOB'; the running worker stays",
        )
    differ = [f"{key}: {status[key]}, in the file {value}" for key, value in given.items() if status[key] != value]
    if grows:
        differ = []
    if differ:
        raise OperatorError(
            ExitCode.WRONG_CLUSTER,
            f"expected {file} to describe the cluster that this node holds snapshots of, found another "
            f"({'; '.join(differ)}). They would be given up, so the running worker stays. Put the file right; to "
            "change nodes, groups or parity, give the file a higher epoch",
        )


def lost(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Jobs whose committed snapshot was whole on the node and is not any more."""
    return [
        name
        for name, held in before["jobs"].items()
        if held["whole"] and not after["jobs"].get(name, {"whole": False})["whole"]
    ]


def _own_row(daemon: Daemon) -> dict[str, Any]:
    return _row_of(daemon.status(), daemon.welcome.node_name)


def _row_of(status: dict[str, Any], name: str) -> dict[str, Any]:
    """A node's row; where a job is still in the epoch before, with what is held of it there."""
    row: dict[str, Any] = next(row for row in status["nodes"] if row["name"] == name)
    here = (status.get("earlier") or {}).get("here", {})
    there = {job: held for job, held in here.items() if row["jobs"].get(job, {}).get("committed_step") is None}
    return {**row, "jobs": {**row["jobs"], **there}}


def _wait_back(path: Path, *, name: str, session: int) -> dict[str, Any]:
    deadline_s = time.monotonic() + BACK_S
    while time.monotonic() < deadline_s:
        time.sleep(LOOK_S)
        try:
            with Daemon(path) as daemon:
                row = _own_row(daemon)
        except OperatorError:
            continue
        if row["worker_session"] > session:
            return row
    raise OperatorError(
        ExitCode.UNREACHABLE,
        f"the new worker of node {name} did not answer within {BACK_S:.0f} s; its memory is held, its log says why",
    )


def _steps(row: dict[str, Any]) -> dict[str, int]:
    return {job: held["committed_step"] for job, held in row["jobs"].items() if held["committed_step"] is not None}
