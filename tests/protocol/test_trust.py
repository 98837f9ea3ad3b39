"""What may be listened on without keys, and what a key file says."""

import pytest
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.trust import exposed_nodes, read_key, refuse_exposure

PUBLIC = "a" * 40


def cluster(*hosts: str, keys_dir: str | None = None) -> ClusterConfig:
    nodes = [NodeConfig(name=f"n{i}", host=host, port=7400 + i, domain=f"d{i}") for i, host in enumerate(hosts)]
    return ClusterConfig(cluster_name="lab", nodes=tuple(nodes), parity=0, keys_dir=keys_dir)


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "0.0.0.0", "::", "fd00::2", "head.example", "localhost.example", "128.0.0.1"]
)
def test_without_keys_nothing_listens_where_others_reach(host: str) -> None:
    with pytest.raises(OperatorError, match=r"expected keys, since node n1 would listen on .*keys init") as caught:
        refuse_exposure(cluster("127.0.0.1", host))
    assert caught.value.exit_code is ExitCode.WRONG_CLUSTER
    refuse_exposure(cluster("127.0.0.1", host, keys_dir="/etc/holdfast/keys"))


def test_one_machine_alone_needs_no_keys() -> None:
    refuse_exposure(cluster("127.0.0.1", "127.9.9.9", "::1", "localhost"))


def test_all_that_are_exposed_are_counted() -> None:
    config = cluster("10.0.0.1", "127.0.0.1", "10.0.0.3")
    assert exposed_nodes(config) == ["n0", "n2"]
    with pytest.raises(OperatorError, match="node n0 and 1 more"):
        refuse_exposure(config)


def test_a_key_file_is_read_line_by_line() -> None:
    public = f'# a comment\ncurve\n    public-key = "{PUBLIC}"\n'
    assert read_key(public).public == PUBLIC
    assert read_key(public).secret is None
    assert read_key(public + f'    secret-key = "{"b" * 40}"\n').secret == "b" * 40


@pytest.mark.parametrize("text", ["", "curve\n", f'public-key = "{PUBLIC[1:]}"', f"public-key = {PUBLIC}"])
def test_what_is_no_key_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="public-key"):
        read_key(text)
