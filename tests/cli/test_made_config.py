"""The file of a made config; its text is tested with those that make it."""

from pathlib import Path

import pytest
from holdfast.cli.made_config import write_config
from holdfast.protocol.exit_codes import OperatorError


def test_a_folder_of_somebody_else_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatorError, match="give --dir a folder of your own"):
        write_config(tmp_path / "file", "h1", "text")
