"""The pages over a real socket, answered by a thread that stands for the loop; and the metrics' text."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from holdfast.daemon.shell.pages import Pages, StatusRequests, metrics
from holdfast.protocol.exit_codes import OperatorError

STATUS: dict[str, Any] = {
    "verdict": "DEGRADED",
    "nodes": [
        {"name": "a", "state": "up", "arena_bytes": 4096},
        {"name": "b", "state": "down", "arena_bytes": 0},
    ],
    "jobs": [{"name": "gpt", "committed_step": 7, "more_losses": 1, "protect_s": 0.25, "digest_failures": 0}],
}


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
    pages = Pages("127.0.0.1", free_port, requests)
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
    assert get(port, "/metrics") == (200, metrics(STATUS))
    assert get(port, "/elsewhere")[0] == 404


def test_a_loop_that_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.daemon.shell.pages.ANSWER_S", 0.05)
    assert StatusRequests(lambda: None).ask() is None


def test_an_address_in_use_is_refused_by_name(port: int) -> None:
    with pytest.raises(OperatorError, match=rf"http\.address: can't listen on 127\.0\.0\.1:{port}"):
        Pages("127.0.0.1", port, StatusRequests(lambda: None))


def test_metrics_are_prometheus_text() -> None:
    lines = metrics(STATUS).splitlines()
    assert 'holdfast_committed_step{job="gpt"} 7' in lines
    assert 'holdfast_tolerable_losses{job="gpt"} 1' in lines
    assert "holdfast_verdict 1" in lines
    assert 'holdfast_node_up{node="b"} 0' in lines
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {line.partition("{")[0].split()[0] for line in lines if not line.startswith("#")} <= named
