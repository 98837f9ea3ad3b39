"""`holdfast recover`: rebuild what replaced nodes lost, and show how far it is.

Covers asking and watching; the rebuild runs in the daemons and goes on if this command is interrupted. On a terminal
one line is rewritten; otherwise each change is a JSON line on stderr. `--json` prints one object at the end.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import Subparsers, add_json_flag
from holdfast.cli.link import LOOK_S, Daemon, default_socket
from holdfast.cli.output import emit, emit_json
from holdfast.cli.status import mib
from holdfast.protocol.exit_codes import ExitCode, OperatorError

ASK_AGAIN_S = 2.0  # a wish to rebuild may be lost on its way; asking twice does no harm
FAILURES_MAX = 3  # rebuilds that fail although enough is left; then the log of that node knows more
STALLED_S = 60.0  # without progress for so long, the command gives up watching

Watcher = Callable[[dict[str, dict[str, Any]]], None]


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("recover", help="rebuild what a replaced node lost, with progress")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon to ask; default: HOLDFAST_SOCKET")
    parser.add_argument("--node", metavar="NAME", help="the node to rebuild; default: all that lost something")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be rebuilt")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Start the rebuild, watch it to its end."""
    with Daemon(args.socket or default_socket()) as daemon:
        before = daemon.complete_status()
        if not before["complete"]:
            raise OperatorError(
                ExitCode.UNREACHABLE,
                f"{', '.join(before['unheard'])} have not said what they hold, so the loss is not known; ask the "
                f"daemon of {before['collector']}, or look at 'holdfast status'",
            )
        if problem := _unrecoverable(before):
            raise OperatorError(ExitCode.NOT_RECOVERABLE, problem)
        lost = losses(before)
        if args.node is not None:
            _refuse_unknown(args.node, before)
            lost = {args.node: lost[args.node]} if args.node in lost else {}
        if args.dry_run or not lost:
            return _say_plan(lost, givers(before, lost), args, others=sorted(set(losses(before)) - set(lost)))
        started_s = time.monotonic()
        daemon.recover(args.node)
        watch(daemon, set(lost), Progress())
        seconds = time.monotonic() - started_s
        received = _received(daemon.status(), set(lost))
    total = sum(entry["lost_bytes"] for entry in lost.values())
    if args.json:
        fields = {"nodes": sorted(lost), "bytes": total, "received_bytes": received, "seconds": seconds}
        emit_json("holdfast.recover/1", {**fields, "dry_run": False})
    else:
        told = f"rebuilt {mib(total)} on {', '.join(sorted(lost))} in {seconds:.2f} s"
        emit(told + (f", {received / total:.2f} bytes received per lost byte" if total and received else ""))
    return int(ExitCode.DONE)


def givers(status: dict[str, Any], lost: Collection[str]) -> dict[str, list[str]]:
    """Who can give: for each node that lost something the live members of its group that are whole."""
    rows = {row["name"]: row for row in status["nodes"]}
    groups = {name: group for group in status.get("groups", []) for name in group}
    return {
        name: [other for other in groups.get(name, []) if other not in lost and rows[other]["state"] == "up"]
        for name in lost
    }


def _received(status: dict[str, Any], names: set[str]) -> int:
    entries = [entry for node in status["nodes"] if node["name"] in names for entry in node["jobs"].values()]
    return sum(entry.get("received_bytes", 0) for entry in entries)


def losses(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each live node lost: node -> lost_bytes, rebuilt_bytes, rebuild (the worst state of its jobs)."""
    found: dict[str, dict[str, Any]] = {}
    for node in status["nodes"]:
        held = [e for e in node["jobs"].values() if e["committed_step"] is not None and not e["whole"]]
        if held and node["state"] == "up":
            states = [entry["rebuild"] for entry in held]
            found[node["name"]] = {
                "lost_bytes": sum(entry["lost_bytes"] for entry in held),
                "rebuilt_bytes": sum(entry["rebuilt_bytes"] for entry in held),
                "received_bytes": sum(entry.get("received_bytes", 0) for entry in held),
                "rebuild_s": max(entry.get("rebuild_s", 0.0) for entry in held),
                "rebuild": next((s for s in ("failed", "running") if s in states), ""),
            }
    return found


def watch(daemon: Daemon, names: set[str], report: Watcher) -> None:
    """Follow the rebuild of these nodes until they are whole.

    Raises:
        OperatorError: one failed (not recoverable), or nothing moves any more.
    """
    last, moved_s = -1, time.monotonic()
    asked_s, failures_left = time.monotonic(), FAILURES_MAX
    while True:
        status = daemon.status()
        lost = {name: entry for name, entry in losses(status).items() if name in names}
        report(lost)
        if not lost and status["complete"]:
            return
        failed = [name for name, entry in lost.items() if entry["rebuild"] == "failed"]
        problem = _unrecoverable(status) if status["complete"] else ""
        if failed and (problem or not failures_left):
            raise OperatorError(
                ExitCode.NOT_RECOVERABLE,
                f"the rebuild of {', '.join(failed)} failed: {problem or 'see the log of that node'}",
            )
        if time.monotonic() - asked_s > ASK_AGAIN_S and any(entry["rebuild"] != "running" for entry in lost.values()):
            daemon.recover()
            asked_s = time.monotonic()
            failures_left -= bool(failed)  # a survivor that was away for a moment may be back
        done = sum(entry["rebuilt_bytes"] for entry in lost.values()) - sum(e["lost_bytes"] for e in lost.values())
        if done != last:
            last, moved_s = done, time.monotonic()
        elif time.monotonic() - moved_s > STALLED_S:
            raise OperatorError(
                ExitCode.BUG,
                f"no progress for {STALLED_S} s on {', '.join(sorted(lost))}; see 'holdfast status' and their logs",
            )
        time.sleep(LOOK_S)


def _unrecoverable(status: dict[str, Any]) -> str:
    for job in status["jobs"]:
        if job["verdict"] == "LOST":
            return (
                f"job {job['name']}: step {job['committed_step']} is not recoverable: {job['reason']}. "
                "Bring back the memory of enough of these nodes, or start from an older or durable copy"
            )
    return ""


def _refuse_unknown(name: str, status: dict[str, Any]) -> None:
    nodes = {node["name"]: node for node in status["nodes"]}
    if name not in nodes:
        raise OperatorError(ExitCode.USAGE, f"--node: expected one of {', '.join(nodes)}, found {name!r}")
    if nodes[name]["state"] != "up":
        raise OperatorError(
            ExitCode.UNREACHABLE,
            f"node {name} is {nodes[name]['state']}: start a replacement with 'holdfast daemon --node {name}' first",
        )


def _say_plan(
    lost: dict[str, dict[str, Any]], givers: dict[str, list[str]], args: argparse.Namespace, *, others: list[str]
) -> int:
    total = sum(entry["lost_bytes"] for entry in lost.values())
    if args.json:
        plan = [
            {"node": name, "bytes": entry["lost_bytes"], "from": givers[name], "expected_s": expected_s(entry)}
            for name, entry in sorted(lost.items())
        ]
        fields = {"nodes": sorted(lost), "bytes": total, "received_bytes": 0, "seconds": 0.0}
        emit_json("holdfast.recover/1", {**fields, "dry_run": args.dry_run, "plan": plan})
    elif not lost:
        where = f" on {args.node}" if args.node else ""
        elsewhere = f"; {', '.join(others)} lost something" if others else ""
        emit(f"nothing is lost{where}: no rebuild is needed{elsewhere}")
    else:
        for name, entry in sorted(lost.items()):
            emit(f"would rebuild {mib(entry['lost_bytes'])} on {name} from {', '.join(givers[name]) or 'nobody'}")
            emit(f"  it receives about as much, each of them sends about as much; {_expected_text(entry)}")
    return int(ExitCode.DONE)


def expected_s(entry: dict[str, Any]) -> float | None:
    """How long the rest of a rebuild should take at the rate so far; None before it has a rate."""
    if entry["rebuild"] != "running" or not entry["rebuilt_bytes"] or entry["rebuild_s"] <= 0:
        return None
    left_bytes = entry["lost_bytes"] - entry["rebuilt_bytes"]
    return float(left_bytes / (entry["rebuilt_bytes"] / entry["rebuild_s"]))


def _expected_text(entry: dict[str, Any]) -> str:
    if (seconds := expected_s(entry)) is not None:
        return f"it is running and should be done in {seconds:.1f} s"
    return f"at 1 GB/s that takes {entry['lost_bytes'] / 1e9:.1f} s"


class Progress:
    """Shows how far it is: one line that is rewritten on a terminal, else a JSON line for each change."""

    def __init__(self) -> None:
        self.last: dict[str, dict[str, Any]] | None = None

    def __call__(self, lost: dict[str, dict[str, Any]]) -> None:
        """Show one look."""
        if not sys.stderr.isatty():
            if lost != self.last:
                for name, entry in sorted(lost.items()):
                    line = {"event": "rebuild", "node": name, **entry, "expected_s": expected_s(entry)}
                    sys.stderr.write(json.dumps(line) + "\n")
            self.last = lost
            return
        parts = [_part(name, entry) for name, entry in sorted(lost.items())]
        sys.stderr.write("\r\x1b[K" + ("rebuilding " + ", ".join(parts) if parts else ""))
        sys.stderr.flush()


def _part(name: str, entry: dict[str, Any]) -> str:
    text = f"{name} {entry['rebuilt_bytes'] / max(entry['lost_bytes'], 1):.0%} of {mib(entry['lost_bytes'])}"
    left_s = expected_s(entry)
    if left_s is None:
        return text
    rate = entry["rebuilt_bytes"] / entry["rebuild_s"] / (1 << 30)
    return f"{text} at {rate:.2f} GiB/s, {left_s:.0f} s left"
