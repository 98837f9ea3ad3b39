"""Where a daemon is looked for: a path, or an address of the network."""

from pathlib import Path

import pytest
from holdfast.client.addresses import daemon_address, split_network


def test_a_path_stays_one_and_an_address_of_the_network_is_no_path() -> None:
    assert daemon_address("/run/a", local_rank=0) == Path("/run/a")
    assert daemon_address("tcp://10.0.0.1:7500", local_rank=0) == "tcp://10.0.0.1:7500"
    assert daemon_address(Path("tcp://10.0.0.1:7500"), local_rank=0) == "tcp://10.0.0.1:7500"
    found = daemon_address("tcp://n0@[fd00::1]:7500", local_rank=0)
    assert found == daemon_address(found, local_rank=3) == "tcp://n0@[fd00::1]:7500"


def test_ranks_of_a_host_take_several_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_SOCKET", "/run/a,tcp://b:1,")
    assert [daemon_address(None, local_rank=rank) for rank in range(3)] == [Path("/run/a"), "tcp://b:1", Path("/run/a")]


def test_the_default_is_the_system_s_or_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOLDFAST_SOCKET", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert daemon_address(None, local_rank=0) in {
        Path("/run/holdfast/holdfast.sock"),
        Path("/run/user/1/holdfast/holdfast.sock"),
    }


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("tcp://h:1", (None, "h", 1)),
        ("tcp://n0@h:1", ("n0", "h", 1)),
        ("tcp://n0@[::1]:65535", ("n0", "::1", 65535)),
    ],
)
def test_an_address_may_name_the_node(address: str, parts: tuple[str | None, str, int]) -> None:
    assert split_network(address) == parts


@pytest.mark.parametrize(
    "address", ["tcp:", "tcp://", "tcp://h", "tcp://h:0", "tcp://h:x", "tcp://a@b@h:1", "tcp://@h:1"]
)
def test_what_is_none_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(ValueError, match=r"socket: expected .*tcp://host:port"):
        daemon_address(address, local_rank=0)
