"""Record files are replaced whole, the oldest go, and a directory that can't be written is only logged."""

import logging
import os
from pathlib import Path

import msgspec
import pytest
from holdfast.daemon.core.actions import WriteRecord
from holdfast.daemon.shell import records
from holdfast.protocol.recovery import RecoveryRecord, StepRecord


def record(step: int) -> RecoveryRecord:
    return RecoveryRecord("lab", 1, "n0", "gpt", 1, StepRecord(step, 1), (), (), (), None, None)


def test_the_newest_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "FILES_KEPT_MAX", 2)
    other = tmp_path / "recovery-n1-gpt-1-0.json"
    other.write_text("{}")
    for step in range(4):
        files = records.RecordFiles(tmp_path, "n0")
        files.write(WriteRecord(f"recovery-n0-gpt-1-{step}.json", record(step)))
        files.stop()
        os.utime(tmp_path / f"recovery-n0-gpt-1-{step}.json", (step, step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "recovery-n0-gpt-1-2.json", "recovery-n0-gpt-1-3.json", other.name
    ]  # fmt: skip
    read = msgspec.json.decode((tmp_path / "recovery-n0-gpt-1-3.json").read_bytes(), type=RecoveryRecord)
    assert read == record(3)


def test_a_directory_that_can_not_be_written_costs_the_record_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    files = records.RecordFiles(tmp_path / "file", "n0")
    with caplog.at_level(logging.WARNING):
        files.write(WriteRecord("recovery-n0-gpt-1-1.json", record(1)))
        files.stop()
    assert "set daemon.state_dir to a writable place" in caplog.text
