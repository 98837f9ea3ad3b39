"""An S3 server of its own: moto's, a process that keeps objects in its memory, and knows no account but any.

Covers starting it, buckets, spoiling objects behind everybody's back, and the environment in which clients find it.
"""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from local_cluster import free_ports, until

START_S = 60.0  # it imports a great deal, and cores are busy


class S3Server:
    """`with` ends it."""

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        (self.port,) = free_ports(1)
        self._log, self._environment = folder / "s3.log", {**os.environ, **(environment or {})}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
            )  # fmt: skip

    def __enter__(self) -> Self:
        until(self._answers, "the S3 server answers", seconds=START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    @property
    def variables(self) -> dict[str, str]:
        """How clients find it, and as whom they come."""
        return {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret",
        }  # fmt: skip

    def ask(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """One plain request, without a signature."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", method=method, data=content)
        with urllib.request.urlopen(request, timeout=20) as answer:
            found: bytes = answer.read()
        return found

    def _answers(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()[-2000:]
        try:
            self.ask("GET", "moto-api/data.json")
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True
