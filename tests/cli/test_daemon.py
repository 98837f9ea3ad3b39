"""Which node a host is, where its socket goes, and what is refused before a daemon starts."""

from pathlib import Path

import pytest
from holdfast.cli.daemon import keeper_command, node_of_host, socket_of
from holdfast.cli.main import main
from holdfast.protocol.config import parse_config
from holdfast.protocol.exit_codes import OperatorError

TEXT = """
[cluster]
name = "lab"
parity = 1
[[node]]
name = "alpha"
address = "10.0.0.1:7400"
[[node]]
name = "beta"
address = "beta.example:7400"
"""
CONFIG = parse_config(TEXT, origin="test").config


def test_a_host_is_found_by_name_or_address() -> None:
    assert node_of_host(CONFIG, ["alpha.example", "alpha"]) == "alpha"
    assert node_of_host(CONFIG, ["beta.example"]) == "beta"


def test_an_unknown_host_is_refused_with_its_names() -> None:
    with pytest.raises(OperatorError, match=r"this host \(gamma\), found none; give --node NAME"):
        node_of_host(CONFIG, ["gamma"])


def test_one_node_needs_no_name() -> None:
    single = parse_config(TEXT.replace("parity = 1", "parity = 0").rpartition("[[node]]")[0], origin="test").config
    assert node_of_host(single, ["gamma"]) == "alpha"


def test_the_socket_is_as_configured() -> None:
    configured = parse_config(TEXT + '[daemon]\nsocket = "/run/x/{node}.sock"\n', origin="test").config
    assert socket_of(configured, "beta", {}) == Path("/run/x/beta.sock")


def test_the_command_line_names_the_keeper_and_all_that_the_worker_needs() -> None:
    command = keeper_command(Path("/c.toml"), "alpha", Path("/s.sock"))
    assert command[1:4] == ["-m", "holdfast.daemon.keeper", "--"]
    assert command[4:] == ["--config", "/c.toml", "--node", "alpha", "--socket", "/s.sock"]


def test_mistakes_end_before_a_daemon_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text(TEXT)
    assert main(["daemon", "--config", str(config), "--node", "gamma"]) == 2
    assert "expected one of alpha, beta, found 'gamma'" in capsys.readouterr().err
    config.write_text(TEXT.replace("parity = 1", "parity = 9"))
    assert main(["daemon", "--config", str(config), "--node", "alpha"]) == 2
    assert "cluster.parity" in capsys.readouterr().err
