"""What a node shows over HTTP: / (a page to look at), /livez, /readyz, /status.json and /metrics.

Covers answering; what is shown is made on the loop's thread, which hands it over when asked. Meant for loopback:
nothing here is authenticated, and nothing here changes anything.
"""

import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from holdfast.daemon.shell.metrics import Meters
from holdfast.protocol.exit_codes import ExitCode, OperatorError

log = logging.getLogger(__name__)

ANSWER_S = 2.0  # the loop answers at its next turn; longer means that it hangs, which is what /livez tells
REQUEST_S = 5.0  # a client that sends nothing for so long is cut off
REQUESTS_MAX = 32  # answered at the same time; who comes on top of that is cut off, and a browser comes again
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
# The page loads nothing but its own three files and the status, and nobody may frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


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

    def __init__(self, host: str, port: int, requests: StatusRequests, meters: Meters) -> None:
        class Handler(_Handler):
            status_requests = requests
            counted = meters

        try:
            self._server = _Server((host, port), Handler)
        except OSError as error:
            raise OperatorError(
                ExitCode.USAGE,
                f"http.address: can't listen on {host}:{port}: {error}; choose another one or leave it out",
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """One thread per request, and a bound on them."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._free = threading.Semaphore(REQUESTS_MAX)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # socketserver's own types
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # as above
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # as above
        log.debug("a reader of the pages went away: %s", client_address)


class _Handler(BaseHTTPRequestHandler):
    status_requests: StatusRequests
    counted: Meters
    timeout = REQUEST_S
    server_version = "holdfast"
    sys_version = ""

    def do_GET(self) -> None:  # the name that http.server calls
        path = self.path.partition("?")[0]
        if path in _FILES:
            name, kind = _FILES[path]
            self._send(200, kind, files(__package__).joinpath(name).read_text(encoding="utf-8"))
            return
        status = self.status_requests.ask()
        if status is None:
            self._send(503, "text/plain", "the daemon's loop does not answer\n")
            return
        match path:
            case "/livez":
                self._send(200, "text/plain", "ok\n")
            case "/readyz":
                away = [node["name"] for node in status["nodes"] if node["state"] != "up"]
                text = f"not up: {', '.join(away)}\n" if away else "ok\n"
                self._send(503 if away else 200, "text/plain", text)
            case "/status.json":
                self._send(200, "application/json", json.dumps(status))
            case "/metrics":
                self._send(200, "text/plain; version=0.0.4", self.counted.text(status))
            case _:
                self._send(404, "text/plain", "known here: / /livez /readyz /status.json /metrics\n")

    def _send(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
        log.debug(format, *args)
