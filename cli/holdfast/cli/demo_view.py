"""What the demonstration shows while it runs, on standard error: a live picture on a terminal, else plain lines.

Covers showing; what is shown comes from the daemons' status and the ranks' events.
"""

import os
import sys
import time
from typing import Any, Protocol

from holdfast.cli.demo_training import Training
from holdfast.cli.status import mib
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

REFRESH_PER_S = 8
LINE_S = 1.0  # between two plain lines of progress
_STYLES = {"up": "green", "rebuilding": "yellow", "lost": "red", "down": "red"}


class View(Protocol):
    """Where progress goes. Use as a context manager."""

    def __enter__(self) -> "View": ...
    def __exit__(self, *_: object) -> None: ...

    def say(self, text: str) -> None:
        """A phase begins, or something worth keeping has happened."""

    def show(self, status: dict[str, Any] | None, training: Training | None) -> None:
        """How things are now; called often."""


def choose_view() -> View:
    """A live picture if standard error is a terminal that may be coloured, else lines."""
    live = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return LiveView() if live else LineView()


class LineView:
    """Plain lines with the seconds since the start."""

    def __init__(self) -> None:
        self._started_s = self._shown_s = time.monotonic()
        self._last = ""

    def __enter__(self) -> "LineView":
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """One line."""
        sys.stderr.write(f"[{time.monotonic() - self._started_s:6.1f} s] {text}\n")
        sys.stderr.flush()

    def show(self, status: dict[str, Any] | None, training: Training | None) -> None:
        """A line when something has changed, at most one per `LINE_S`."""
        now_s = time.monotonic()
        if now_s - self._shown_s < LINE_S:
            return
        nodes = ", ".join(f"{name} {text}" for name, state, text in node_cells(status) if state != "up")
        line = "; ".join(part for part in (progress_text(status, training), nodes) if part)
        if line and line != self._last:
            self._shown_s, self._last = now_s, line
            self.say("  " + line)


class LiveView:
    """A picture that is redrawn in place; what was said stays above it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=REFRESH_PER_S, transient=True)
        self._started_s = time.monotonic()
        self._phase = ""

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """The phase now; the one before goes into the scrollback."""
        self._phase = text
        self._console.print(Text(f"{time.monotonic() - self._started_s:6.1f} s  {text}"))

    def show(self, status: dict[str, Any] | None, training: Training | None) -> None:
        """Redraw."""
        nodes = Table(box=None, padding=(0, 2), show_header=False)
        for name, state, text in node_cells(status):
            nodes.add_row(Text(name), Text(text, style=_STYLES[state]))
        self._live.update(
            Group(nodes, Text(progress_text(status, training), style="bold"), Text(self._phase, style="cyan"))
        )


def node_cells(status: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """For each node its name, its state (up, rebuilding, lost, down) and the state in words."""
    cells = []
    for node in status["nodes"] if status else ():
        held = list(node["jobs"].values())
        lost_bytes = sum(job["lost_bytes"] for job in held)
        ranks = sum(len(job["ranks"]) for job in held)
        if node["state"] != "up":
            cells.append((node["name"], "down", node["state"]))
        elif any(job["rebuild"] == "running" for job in held) and lost_bytes:
            done_bytes = sum(job["rebuilt_bytes"] for job in held)
            text = f"rebuilding {done_bytes / lost_bytes:4.0%} of {mib(lost_bytes)}"
            cells.append((node["name"], "rebuilding", text))
        elif lost_bytes:
            cells.append((node["name"], "lost", f"lost {mib(lost_bytes)}"))
        else:
            cells.append((node["name"], "up", f"up, {ranks} rank{'' if ranks == 1 else 's'} attached"))
    return cells


def progress_text(status: dict[str, Any] | None, training: Training | None) -> str:
    """Ranks, steps and the loss in one line; empty before there is anything."""
    parts = []
    log = training.log if training is not None else None
    if training is not None and log is not None and log.restart >= 0:
        parts.append(f"{training.living_count} of {log.world_size} ranks running")
        if log.newest_step >= 0:
            parts.append(f"step {log.newest_step}")
    committed = [job["committed_step"] for job in status["jobs"]] if status else []
    if any(step is not None for step in committed):
        parts.append(f"committed step {max(step for step in committed if step is not None)}")
    if log is not None and log.loss is not None and log.newest_step >= 0:
        parts.append(f"loss {log.loss:.4f}")
    return ", ".join(parts)
