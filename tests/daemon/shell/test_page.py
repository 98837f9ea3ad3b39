"""The page in a real browser: headless chromium shows a cluster with a lost and a half rebuilt node.

Skipped where there is no chromium (Debian: apt-get install chromium). With HOLDFAST_TEST_SHOTS=DIR in the environment
the pictures are kept there, light and dark, wide and narrow, to be looked at.
"""

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from holdfast.daemon.shell.metrics import Meters
from holdfast.daemon.shell.pages import Pages, StatusRequests

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MIB = 1 << 20

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")


def held(**changes: Any) -> dict[str, Any]:
    plain = {"committed_step": 1200, "staged_step": 1201, "whole": True, "lost_bytes": 0, "rebuilt_bytes": 0}
    return plain | {"rebuild": "", "ranks": [0], "digest_failures": 0} | changes


def node(index: int, **changes: Any) -> dict[str, Any]:
    name = f"gpu-{index:02d}"
    plain = {"name": name, "index": index, "address": f"10.0.0.{index}:7400", "domain": f"rack-{index % 3}"}
    plain |= {"group": index // 6, "state": "up", "reason": "", "incarnation": 1, "worker_session": 1}
    plain |= {"arena_bytes": 300 * MIB, "budget_bytes": 512 * MIB, "engine": "native", "jobs": {"tiny-gpt": held()}}
    return plain | changes


def status() -> dict[str, Any]:
    nodes = [node(index) for index in range(12)]
    half = held(whole=False, lost_bytes=200 * MIB, rebuilt_bytes=90 * MIB, rebuild="running")
    nodes[2] = node(2, jobs={"tiny-gpt": half})
    nodes[9] = node(9, state="down", reason="nothing heard from it", jobs={}, arena_bytes=0, budget_bytes=0)
    nodes[10] = node(10, state="refused", reason="<b>expected</b> epoch 1, found 2", jobs={}, budget_bytes=0)
    job = {"name": "tiny-gpt", "attempt": 2, "committed_step": 1200, "committed_attempt": 2, "ranks": 12}
    job |= {"closed": False, "protect_s": 0.42, "digest_failures": 3, "lost_nodes": ["gpu-02"], "more_losses": 1}
    job |= {"snapshot_bytes": 2400 * MIB, "verdict": "DEGRADED", "reason": "gpu-02 lost: 1 more can be lost"}
    return {
        "schema": "holdfast.status/1", "cluster": "lab", "epoch": 1, "parity": 2, "seen_by": "gpu-00",
        "groups": [[one["name"] for one in nodes if one["group"] == group] for group in (0, 1)],
        "collector": "gpu-00", "verdict": "DEGRADED", "reason": "job tiny-gpt: gpu-02 lost; not up: gpu-09, gpu-10",
        "more_losses": 1, "jobs": [job], "nodes": nodes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    wanted, stopping = threading.Event(), threading.Event()
    requests = StatusRequests(wanted.set)

    def loop() -> None:
        while not stopping.is_set():
            wanted.wait()
            wanted.clear()
            requests.serve(status)

    thread = threading.Thread(target=loop)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pages = Pages("127.0.0.1", port, requests, Meters(chunk_bytes=1, version="0"))
    yield f"http://127.0.0.1:{port}/"
    pages.stop()
    stopping.set()
    wanted.set()
    thread.join()


def browse(url: str, profile: Path, *options: str) -> str:
    assert BROWSER is not None
    plain = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    quiet = ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    done = subprocess.run(
        [BROWSER, *plain, *quiet, "--virtual-time-budget=3000", *options, url],
        capture_output=True, text=True, timeout=100, check=True, env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    return done.stdout


def test_the_page_shows_what_is_lost_and_what_fills_up(url: str, tmp_path: Path) -> None:
    seen = browse(url, tmp_path, "--dump-dom")
    text = re.sub(r"<[^>]*>", " ", seen)
    for words in ("DEGRADED", "1 more node can be lost in every group.", "step 1200", "rebuilding, 45 % of 200.0 MiB"):
        assert words in text, words
    assert "refused" in text
    assert "&lt;b&gt;expected&lt;/b&gt; epoch 1" in seen  # a peer's words are text, never markup
    assert (
        len(re.findall(r'class="cell data lost"', seen.partition('id="groups"')[2])) == 4
    )  # gpu-02: 6 stripes, 2 parity
    assert len(re.findall(r'class="cell parity lost"', seen)) == 2
    assert len(re.findall(r'class="cell (?:data|parity) away"', seen.partition('id="groups"')[2])) == 12
    fills = [float(found) for found in re.findall(r'<u style="width: ([0-9.]+)%', seen)]
    assert [round(fill) for fill in fills] == [100, 100, 70, 0, 0, 0]  # 45 % of six stripes
    assert 'id="stale" role="alert" hidden' in seen


def test_a_page_without_its_daemon_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.daemon.shell.pages.ANSWER_S", 0.05)
    requests = StatusRequests(lambda: None)  # a loop that hangs
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pages = Pages("127.0.0.1", port, requests, Meters(chunk_bytes=1, version="0"))
    seen = browse(f"http://127.0.0.1:{port}/", tmp_path, "--dump-dom")
    pages.stop()
    assert "The daemon does not answer (the daemon's loop does not answer)" in seen


@pytest.mark.skipif("HOLDFAST_TEST_SHOTS" not in os.environ, reason="HOLDFAST_TEST_SHOTS names no folder for pictures")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["1200,1100", "500,1500"])
def test_pictures_to_look_at(url: str, tmp_path: Path, scheme: str, size: str) -> None:
    shot = Path(os.environ["HOLDFAST_TEST_SHOTS"]) / f"{scheme}-{size.partition(',')[0]}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(url, tmp_path, f"--screenshot={shot}", f"--window-size={size}", "--hide-scrollbars", *dark)
    assert shot.stat().st_size > 10_000
