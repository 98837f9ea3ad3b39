"""What a node shows over HTTP: /livez, /readyz, /status.json and /metrics.

Covers answering; what is shown is made on the loop's thread, which hands it over when asked. Meant for loopback:
nothing here is authenticated, and nothing here changes anything.
"""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from holdfast.protocol.exit_codes import ExitCode, OperatorError

log = logging.getLogger(__name__)

ANSWER_S = 2.0  # the loop answers at its next turn; longer means that it hangs, which is what /livez tells
REQUEST_S = 5.0  # a client that sends nothing for so long is cut off
_RESTING = {  # of a job's row: metrics of the same names
    "repaired_chunks": "Resting chunks that were wrong and were repaired from their stripe since the daemons started.",
    "damaged_chunks": "Resting chunks known to be wrong now.",
    "disagreeing_stripes": "Stripes whose parity was not that of their data since the daemons started.",
    "scrub_age_s": "Seconds since the last whole pass over resting memory ended, on the node where it is longest.",
}
_VERDICTS = ("HEALTHY", "DEGRADED", "UNPROTECTED", "LOST")


class StatusRequests:
    """The way to the loop: ask from any thread, answer on the loop's."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: list[tuple[threading.Event, list[dict[str, Any]]]] = []

    def ask(self) -> dict[str, Any] | None:
        """The status, or None if the loop does not answer in time."""
        done, answer = threading.Event(), list[dict[str, Any]]()
        with self._lock:
            self._waiting.append((done, answer))
        self._wake()
        return answer[0] if done.wait(ANSWER_S) else None

    def serve(self, status: Callable[[], dict[str, Any]]) -> None:
        """Answer all that wait. On the loop's thread, every turn; costs nothing when nobody waits."""
        if not self._waiting:
            return
        with self._lock:
            waiting, self._waiting = self._waiting, []
        shown = status()
        for done, answer in waiting:
            answer.append(shown)
            done.set()


class Pages:
    """The HTTP server of one node."""

    def __init__(self, host: str, port: int, requests: StatusRequests) -> None:
        class Handler(_Handler):
            status_requests = requests

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise OperatorError(
                ExitCode.USAGE,
                f"http.address: can't listen on {host}:{port}: {error}; choose another one or leave it out",
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    status_requests: StatusRequests
    timeout = REQUEST_S
    server_version = "holdfast"
    sys_version = ""

    def do_GET(self) -> None:  # the name that http.server calls
        status = self.status_requests.ask()
        if status is None:
            self._send(503, "text/plain", "the daemon's loop does not answer\n")
            return
        match self.path.partition("?")[0]:
            case "/livez":
                self._send(200, "text/plain", "ok\n")
            case "/readyz":
                away = [node["name"] for node in status["nodes"] if node["state"] != "up"]
                text = f"not up: {', '.join(away)}\n" if away else "ok\n"
                self._send(503 if away else 200, "text/plain", text)
            case "/status.json":
                self._send(200, "application/json", json.dumps(status))
            case "/metrics":
                self._send(200, "text/plain; version=0.0.4", metrics(status))
            case _:
                self._send(404, "text/plain", "known here: /livez /readyz /status.json /metrics\n")

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
        log.debug(format, *args)


def metrics(status: dict[str, Any]) -> str:
    """The status as Prometheus text: gauges by job, and this node's arena."""
    lines: list[str] = []

    def gauge(name: str, text: str, samples: Sequence[tuple[dict[str, str], float]]) -> None:
        lines.append(f"# HELP holdfast_{name} {text}")
        lines.append(f"# TYPE holdfast_{name} gauge")
        for labels, value in samples:
            # Job and node names are letters, digits, '.', '_' and '-': nothing in them needs escaping.
            inside = ",".join(f'{key}="{label}"' for key, label in labels.items())
            lines.append(f"holdfast_{name}{{{inside}}} {value}" if inside else f"holdfast_{name} {value}")

    jobs = status["jobs"]
    steps = [({"job": j["name"]}, j["committed_step"]) for j in jobs if j["committed_step"] is not None]
    gauge("committed_step", "Newest committed step.", steps)
    losses = [({"job": j["name"]}, j["more_losses"]) for j in jobs if j["more_losses"] is not None]
    gauge("tolerable_losses", "Further node losses that every group survives.", losses)
    gauge(
        "protect_seconds", "From seal to commit, newest snapshot.", [({"job": j["name"]}, j["protect_s"]) for j in jobs]
    )
    gauge("verdict", "0 healthy, 1 degraded, 2 unprotected, 3 lost.", [({}, _VERDICTS.index(status["verdict"]))])
    up = [({"node": n["name"]}, int(n["state"] == "up")) for n in status["nodes"]]
    gauge("node_up", "Whether a node is heard.", up)
    arena = [({"node": n["name"]}, n["arena_bytes"]) for n in status["nodes"]]
    gauge("arena_bytes", "Memory reserved for snapshots and parity.", arena)
    failures = [({"job": j["name"]}, j["digest_failures"]) for j in jobs]
    gauge("digest_failures", "Chunks that failed their digest since the daemons started.", failures)
    for key, text in _RESTING.items():
        gauge(key, text, [({"job": j["name"]}, j[key]) for j in jobs if key in j])
    return "\n".join(lines) + "\n"
