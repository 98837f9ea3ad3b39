"""The files of recovery records: written aside and renamed, on a thread of their own, the oldest ones removed.

A directory that can't be written costs the record, loudly, and nothing else.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from holdfast.daemon.core.actions import WriteRecord

log = logging.getLogger(__name__)

FILES_KEPT_MAX = 64  # of one node; a recovery a day is two months


class RecordFiles:
    """The records of one node."""

    def __init__(self, directory: Path, node: str) -> None:
        self.directory, self._node = directory, node
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")

    def write(self, action: WriteRecord) -> None:
        """Replace the file of a record, soon."""
        self._thread.submit(self._write, action)

    def stop(self) -> None:
        """Let what is queued be written."""
        self._thread.shutdown(wait=True)

    def _write(self, action: WriteRecord) -> None:
        path = self.directory / action.name
        aside = path.with_suffix(".part")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(msgspec.json.format(msgspec.json.encode(action.record), indent=2) + b"\n")
            aside.replace(path)
            files = sorted(self.directory.glob(f"recovery-{self._node}-*.json"), key=lambda file: file.stat().st_mtime)
            for file in files[:-FILES_KEPT_MAX]:
                file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the recovery record %s can't be written: %s; set daemon.state_dir to a writable place", path,
                        error)  # fmt: skip
