"""The pages over a real socket, answered by a thread that stands for the loop; and the metrics' text."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from holdfast.daemon.shell import pages as pages_module
from holdfast.daemon.shell.metrics import Meters
from holdfast.daemon.shell.pages import Pages, StatusRequests
from holdfast.protocol.exit_codes import OperatorError

HELD = {"lost_bytes": 0, "rebuilt_bytes": 0}
STATUS: dict[str, Any] = {
    "verdict": "DEGRADED",
    "seen_by": "a",
    "nodes": [
        {"name": "a", "state": "up", "arena_bytes": 4096, "budget_bytes": 8192, "engine": "native",
         "worker_session": 2, "jobs": {"gpt": HELD}},
        {"name": "b", "state": "down", "arena_bytes": 0, "budget_bytes": 0, "engine": "",
         "worker_session": 0, "jobs": {}},
    ],
    "jobs": [{"name": "gpt", "committed_step": 7, "more_losses": 1, "protect_s": 0.25, "digest_failures": 0,
              "snapshot_bytes": 100, "ranks": 2}],
}  # fmt: skip


@pytest.fixture
def port() -> Iterator[int]:
    wanted, stopping = threading.Event(), threading.Event()
    requests = StatusRequests(wanted.set)

    def loop() -> None:
        while not stopping.is_set():
            wanted.wait()
            wanted.clear()
            requests.serve(lambda: STATUS)

    thread = threading.Thread(target=loop)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port: int = probe.getsockname()[1]
    pages = Pages("127.0.0.1", free_port, requests, Meters(chunk_bytes=1, version="0"))
    yield free_port
    pages.stop()
    stopping.set()
    wanted.set()
    thread.join()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_pages_show_the_loops_status(port: int) -> None:
    assert get(port, "/livez") == (200, "ok\n")
    assert get(port, "/readyz") == (503, "not up: b\n")
    code, text = get(port, "/status.json")
    assert code == 200
    assert json.loads(text) == STATUS
    assert 'holdfast_committed_step{job="gpt"} 7\n' in get(port, "/metrics")[1]
    assert get(port, "/elsewhere")[0] == 404


def test_a_loop_that_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.daemon.shell.pages.ANSWER_S", 0.05)
    assert StatusRequests(lambda: None).ask() is None


def test_an_address_in_use_is_refused_by_name(port: int) -> None:
    with pytest.raises(OperatorError, match=rf"http\.address: can't listen on 127\.0\.0\.1:{port}"):
        Pages("127.0.0.1", port, StatusRequests(lambda: None), Meters(chunk_bytes=1, version="0"))


def test_the_page_is_three_files_that_load_nothing_from_elsewhere(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for path in ("/page.css", "/page.js"):
        assert path[1:] in page
        assert get(port, path)[0] == 200
    everything = page + get(port, "/page.css")[1] + get(port, "/page.js")[1]
    assert re.findall(r"https?:|//[a-z]", everything.replace("// ", "")) == []
    assert "innerHTML" not in everything


def test_idle_readers_are_bounded_and_harm_nobody_else(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module._Handler, "timeout", 0.2)
    crowd = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(pages_module.REQUESTS_MAX + 8)]
    served = 0
    for one in crowd:  # all are cut off: those beyond the bound at once, the others when they said nothing for long
        assert one.recv(1) == b""
        served += 1
        one.close()
    assert served == len(crowd)
    assert get(port, "/livez") == (200, "ok\n")
