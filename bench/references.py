"""What the end-to-end figures are compared with, and how they are told: copies, raw TCP, the machine, JSON lines."""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

MIB = 1 << 20
RECEIVE_BYTES = 4 * MIB
WAIT_S = 120.0


class WarmCopy:
    """One memcpy of so many bytes into memory that was touched before."""

    def __init__(self, size_bytes: int) -> None:
        self._source, self._target = np.ones(size_bytes, np.uint8), np.ones(size_bytes, np.uint8)

    def seconds(self) -> float:
        """How long it takes now."""
        return timed(lambda: np.copyto(self._target, self._source))


def raw_tcp(size_bytes: int) -> float:
    """Seconds that so many bytes take over one TCP connection on loopback, received into place."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_send, args=(server.getsockname(), size_bytes))
        thread.start()
        connection, _ = server.accept()
        buffer = memoryview(bytearray(RECEIVE_BYTES))
        started_s, left = time.monotonic(), size_bytes
        with connection:
            while left > 0:
                left -= connection.recv_into(buffer)
        seconds = time.monotonic() - started_s
        thread.join()
    return seconds


def _send(address: tuple[str, int], size_bytes: int) -> None:
    block = memoryview(bytes(RECEIVE_BYTES))
    with socket.create_connection(address) as connection:
        left = size_bytes
        while left > 0:
            left -= connection.send(block[: min(left, RECEIVE_BYTES)])


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started_s = time.monotonic()
    work()
    return time.monotonic() - started_s


def wait_for(condition: Callable[[], bool], what: str, *, look_s: float = 0.005) -> None:
    """Look until a condition holds."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {WAIT_S} s for {what}")
        time.sleep(look_s)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_bytes(pid: int) -> int:
    """Resident memory of a process beside memory that it shares, such as the arena."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))


def ratio(
    what: str, ours_s: Sequence[float], reference_s: Sequence[float], *, goal: float, worst: bool = False
) -> dict[str, object]:
    """One figure: medians (with `worst` the largest of ours), their ratio, the spread."""
    ours = max(ours_s) if worst else statistics.median(ours_s)
    reference = statistics.median(reference_s)
    return {
        "what": what, "ratio": ours / reference, "goal": goal, "met": ours / reference <= goal,
        "seconds": ours, "min_s": min(ours_s), "max_s": max(ours_s),
        "reference_s": reference, "reference_min_s": min(reference_s), "reference_max_s": max(reference_s),
    }  # fmt: skip


def machine() -> dict[str, object]:
    """What this ran on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if "model name" in line), "?")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "what": "machine", "cpu": model, "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "kernel": platform.release(), "python": platform.python_version(), "commit": commit.stdout.strip(),
        "command": " ".join(sys.argv),
    }  # fmt: skip


def say(fields: dict[str, object]) -> None:
    """One JSON line."""
    print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in fields.items()}), flush=True)
