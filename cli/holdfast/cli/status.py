"""`holdfast status`: the verdict first, then jobs and nodes. `--watch` shows it every second, with the stripes.

Covers asking and showing; what is true is decided in the daemon. The JSON is the daemon's own tree.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from holdfast.cli.arguments import Subparsers, add_json_flag
from holdfast.cli.drill import describe
from holdfast.cli.link import Daemon, default_socket
from holdfast.cli.output import emit, emit_json, pairs, table
from holdfast.protocol.exit_codes import ExitCode, OperatorError

WATCH_S = 1.0  # between two looks
GROUPS_SHOWN_MAX = 4  # in the map; a screen has no room for more
STRIPES_SHOWN_MAX = 16  # the pattern repeats after as many as there are members


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb."""
    parser = subparsers.add_parser("status", help="how safe the cluster's jobs are, and the state of each node")
    parser.add_argument("--socket", type=Path, metavar="PATH", help="the daemon to ask; default: HOLDFAST_SOCKET")
    parser.add_argument("--watch", action="store_true", help="show it every second until interrupted")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Ask and show."""
    path = args.socket or default_socket()
    if not args.watch:
        _show(_ask(path), as_json=args.json)
        return int(ExitCode.DONE)
    while True:
        try:
            status = _ask(path)
        except OperatorError as error:
            emit(f"{error}")
        else:
            if args.json:
                _show(status, as_json=True)
            elif sys.stdout.isatty():
                sys.stdout.write(picture(status, colour=True))
            else:
                emit(f"{render(status)}\n\n{stripe_map(status)}")
        sys.stdout.flush()
        time.sleep(WATCH_S)


def picture(status: dict[str, Any], *, colour: bool) -> str:
    """The status with its stripes, to be written over the one before: home, each line cleared to its end, the rest."""
    tone = {"HEALTHY": "32", "DEGRADED": "33"}.get(status["verdict"], "31")
    verdict = f"\x1b[1;{tone}m{status['verdict']}\x1b[0m" if colour else status["verdict"]
    text = f"{render(status)}\n\n{stripe_map(status)}".replace(status["verdict"], verdict, 1)
    return "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in text.split("\n")) + "\x1b[J"


def stripe_map(status: dict[str, Any]) -> str:
    """One turn of each group's stripes: which node has data (D) or parity (P) of it, and what of that is lost.

    A lost node's column fills up from the top while it is rebuilt.
    """
    nodes = {node["name"]: node for node in status["nodes"]}
    blocks = ["  stripes: D data, P parity, x lost, . not heard"]
    for index, names in enumerate(status["groups"][:GROUPS_SHOWN_MAX]):
        rows = [
            [str(stripe), *(_cell(nodes[name], stripe, place, len(names), status) for place, name in enumerate(names))]
            for stripe in range(min(len(names), STRIPES_SHOWN_MAX))
        ]
        blocks.append(table([f"group {index}", *names], rows))
    if len(status["groups"]) > GROUPS_SHOWN_MAX:
        blocks.append(f"  and {len(status['groups']) - GROUPS_SHOWN_MAX} more groups")
    return "\n".join(blocks)


def _cell(node: dict[str, Any], stripe: int, place: int, size: int, status: dict[str, Any]) -> str:
    # The m parity chunks of stripe s lie on the nodes (s + j) mod n, j < m.
    kind = "P" if (place - stripe) % size < status["parity"] else "D"
    if node["state"] != "up":
        return "."
    lost = sum(held["lost_bytes"] for held in node["jobs"].values())
    back = sum(held["rebuilt_bytes"] for held in node["jobs"].values())
    return kind if not lost or back * size >= lost * (stripe + 1) else "x"


def _ask(path: Path) -> dict[str, Any]:
    with Daemon(path) as daemon:
        return daemon.status()


def _show(status: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit_json(str(status["schema"]), {key: value for key, value in status.items() if key != "schema"})
    else:
        emit(render(status))


def headline(status: dict[str, Any]) -> str:
    """The verdict, and how many more nodes can be lost."""
    losses = status["more_losses"]
    text = f"{status['verdict']}  {_losses(losses)}"
    return f"{text}\n  {status['reason']}" if status["reason"] else text


def render(status: dict[str, Any]) -> str:
    """The status as text."""
    about = [
        ("cluster", f"{status['cluster']}, epoch {status['epoch']}, parity {status['parity']}"),
        ("seen by", f"{status['seen_by']}, collector {status['collector']}"),
    ]
    if text := earlier_text(status):
        about.append(("before", text))
    engines = sorted({node["engine"] for node in status["nodes"] if node["engine"]})
    if engines:
        about.append(("coding", ", ".join(engines)))
    blocks = [headline(status), pairs(about)]
    if status["jobs"]:
        rows = [_job_cells(job) for job in status["jobs"]]
        blocks.append(table(["job", "verdict", "committed", "ranks", "snapshot", "protect", "more losses"], rows))
    proofs = [describe(job) for job in status["jobs"] if job.get("drill")]
    if proofs:
        blocks.append("\n".join(f"  {proof}" for proof in proofs))
    made_up = [text for job in status["jobs"] if (text := reprotection_text(job))]
    if made_up:
        blocks.append("\n".join(f"  {text}" for text in made_up))
    copies = [text for job in status["jobs"] if (text := durable_text(job))]
    if copies:
        blocks.append("\n".join(f"  {text}" for text in copies))
    records = [(node["name"], node["recovery_record"]) for node in status["nodes"] if node.get("recovery_record")]
    if records:
        blocks.append("  last recovery, as recorded on\n" + pairs(records, indent="    "))
    header = ["node", "group", "state", "address", "arena", "holds"]
    blocks.append(table(header, [_node_cells(node) for node in status["nodes"]]))
    old = [
        (f"{view['node']} of {node['name']}", view["problem"])
        for node in status["nodes"]
        for view in node.get("old_views", ())
    ]
    if old:
        blocks.append("  old views\n" + pairs(old, indent="    "))
    return "\n\n".join(blocks)


def earlier_text(status: dict[str, Any]) -> str:
    """What is still in the epoch before, and who serves it, in a line; empty if it is over."""
    row = status.get("earlier")
    if not row:
        return ""
    steps = {job["name"]: job["committed_step"] for job in row.get("jobs", ())}
    jobs = [f"{job} (step {steps[job]})" if steps.get(job) is not None else job for job in row.get("waits_for", steps)]
    text = f"epoch {row['epoch']} is kept until a commit in epoch {status['epoch']} of {', '.join(jobs) or 'no job'}"
    if row.get("served_by"):
        text += f"; served by {', '.join(row['served_by'])}"
    leaving = row.get("leaving", ())
    return f"{text}; {', '.join(leaving)} must not be stopped yet" if leaving else text


def reprotection_text(job: dict[str, Any]) -> str:
    """How far the others make up for absent nodes, in a line; empty if they don't."""
    row = job.get("reprotection")
    if row is None:
        return ""
    names, keepers = ", ".join(row["nodes"]) or "absent nodes", ", ".join(row["kept_by"])
    match row["state"]:
        case "failed":
            text = f"{names} NOT made up for: {row['problem']}"
        case "running":
            text = f"making up for {names}: {row['done_chunks']} of {row['total_chunks']} chunks"
        case _:
            text = f"{names} made up for by {keepers}"
    return f"job {job['name']}: absent nodes: {text}"


def durable_text(job: dict[str, Any]) -> str:
    """What is known of a job's durable copies, in a line; empty if there are none and none are tried."""
    known = job.get("durable") or {}
    told = []
    if known.get("step") is not None:
        age, size = f"{known['age_s']:.0f} s ago", mib(known["size_bytes"])
        told.append(f"step {known['step']} was copied {age} ({size} in {known['seconds']:.1f} s)")
    if known.get("running"):
        told.append("a copy is being made")
    if known.get("failures"):
        told.append(f"{known['failures']} tries in a row FAILED: {known['problem']}")
    return f"job {job['name']}: durable: {'; '.join(told)}" if told else ""


def _losses(count: int | None) -> str:
    match count:
        case None:
            return "losses that would be survived are not known"
        case 0:
            return "no node can be lost"
        case 1:
            return "1 more node can be lost in every group"
        case _:
            return f"{count} more nodes can be lost in every group"


def _job_cells(job: dict[str, Any]) -> list[str]:
    committed = "nothing" if job["committed_step"] is None else f"step {job['committed_step']}"
    return [
        job["name"] + (" (closed)" if job["closed"] else ""),
        job["verdict"],
        committed,
        str(job["ranks"]),
        "-" if job["snapshot_bytes"] is None else mib(job["snapshot_bytes"]),
        f"{job['protect_s']:.2f} s" if job["protect_s"] else "-",
        "-" if job["more_losses"] is None else str(job["more_losses"]),
    ]


def _node_cells(node: dict[str, Any]) -> list[str]:
    state = node["state"] + (f": {node['reason']}" if node["reason"] and node["state"] == "refused" else "")
    holds = [_held_text(name, held) for name, held in node["jobs"].items()]
    arena = f"{mib(node['arena_bytes'])} of {mib(node['budget_bytes'])}" if node["budget_bytes"] else "-"
    return [node["name"], str(node["group"]), state, node["address"], arena, "; ".join(holds) or "-"]


def _held_text(name: str, held: dict[str, Any]) -> str:
    if held["rebuild"] == "running":
        share = held["rebuilt_bytes"] / held["lost_bytes"] if held["lost_bytes"] else 1.0
        return f"{name}: rebuilding, {share:.0%} of {mib(held['lost_bytes'])}"
    if held["lost_bytes"]:
        return f"{name}: LOST {mib(held['lost_bytes'])}; 'holdfast recover' rebuilds it"
    return f"{name}: step {held['committed_step']}" if held["committed_step"] is not None else f"{name}: -"


def mib(size_bytes: int) -> str:
    """A size for people."""
    return f"{size_bytes / (1 << 20):.1f} MiB" if size_bytes < 10 << 30 else f"{size_bytes / (1 << 30):.1f} GiB"
