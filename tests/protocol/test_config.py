"""The cluster's config: what is taken, from where, and that everything wrong with it is said at once."""

from dataclasses import FrozenInstanceError, replace
from typing import Any, cast

import pytest
from holdfast.protocol.config import (
    ClusterConfig,
    ConfigError,
    LoadedConfig,
    NodeConfig,
    Problem,
    config_digest,
    parse_config,
)
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from hypothesis import given
from hypothesis import strategies as st

GOOD = """
[cluster]
name = "tiny"
parity = 1
group_size = 3
epoch = 4
reprotect_after_s = 900

[memory]
budget = "8GiB"
slots = 3
chunk_bytes = "512KiB"
closed_job_s = 60

[security]
keys_dir = "/etc/holdfast/keys"
bulk = "sealed"

[http]
address = "127.0.0.1:9200"
[trainers]
address = "0.0.0.0:7500"

[scrub]
period_s = 3600
bandwidth = "64MiB"
cpu_percent = 2

[drill]
period_s = 1200

[durable]
dir = "/shared/copies"
every_s = 60
every_steps = 100
keep = 5
grace_s = 40
after_lives = 2

[daemon]
socket = "/run/holdfast/{node}.sock"
engine = "numpy"
state_dir = "/var/lib/holdfast"

[[node]]
name = "alpha"
address = "alpha.example:7000"

[[node]]
name = "beta"
address = "[fd00::2]:7000"
domain = "rack-2"

[[node]]
name = "gamma"
address = "10.0.0.3:7001"
domain = "rack-3"
"""

NODES = '[[node]]\nname = "a"\naddress = "h:1"\n[[node]]\nname = "b"\naddress = "h:2"\n'
LEAST = '[cluster]\nname = "x"\nparity = 1\n' + NODES

FIVE_MISTAKES = """
[cluster]
name = "tiny"
parity = "two"
goup_size = 4

[memory]
budget = "8 gigs"

[[node]]
name = "alpha"
address = "alpha.example:7000"

[[node]]
name = "beta"
address = "beta.example:7000"

[[node]]
name = "alpha"
address = "gamma.example:http"
"""


def refused(text: str, **sources: dict[str, str]) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, origin="c.toml", **sources)
    assert caught.value.exit_code is ExitCode.USAGE
    count = len(caught.value.problems)
    assert str(caught.value).startswith(f"c.toml: {count} problem{'s' if count > 1 else ''}\n")
    assert str(caught.value).endswith("holdfast config check c.toml")
    return caught.value.problems


def config_of(**changes: object) -> ClusterConfig:
    nodes = tuple(NodeConfig(name=name, host="h", port=index + 1, domain=name) for index, name in enumerate("abc"))
    return replace(ClusterConfig(cluster_name="x", nodes=nodes), **cast("dict[str, Any]", changes))


def test_a_whole_file_is_read_and_every_origin_known() -> None:
    loaded = parse_config(GOOD, origin="c.toml")
    assert loaded.config == ClusterConfig(
        cluster_name="tiny",
        nodes=(
            NodeConfig(name="alpha", host="alpha.example", port=7000, domain="alpha"),
            NodeConfig(name="beta", host="fd00::2", port=7000, domain="rack-2"),
            NodeConfig(name="gamma", host="10.0.0.3", port=7001, domain="rack-3"),
        ),
        parity=1,
        group_size=3,
        epoch=4,
        reprotect_after_s=900,
        budget_bytes=8 << 30,
        slots=3,
        chunk_bytes=512 << 10,
        closed_job_s=60,
        keys_dir="/etc/holdfast/keys",
        bulk_mode="sealed",
        http_address="127.0.0.1:9200",
        trainers_address="0.0.0.0:7500",
        socket="/run/holdfast/{node}.sock",
        engine="numpy",
        scrub_period_s=3600,
        scrub_bytes_per_s=64 << 20,
        scrub_cpu_percent=2,
        drill_period_s=1200,
        durable_dir="/shared/copies",
        durable_every_s=60,
        durable_every_steps=100,
        durable_keep=5,
        durable_grace_s=40,
        durable_after_lives=2,
        state_dir="/var/lib/holdfast",
    )
    others = {name: origin for name, origin in loaded.origins.items() if name != "node[0].domain"}
    left_out = {"http.allow_remote", "daemon.socket_group"}
    assert {origin for name, origin in others.items() if name not in left_out} == {"file c.toml"}
    assert loaded.origins["node[0].domain"] == "default"
    assert [node.address for node in loaded.config.nodes][1] == "[fd00::2]:7000"


def test_a_bulk_mode_is_one_of_two_and_sealing_needs_keys() -> None:
    found = refused(LEAST + '[security]\nbulk = "plain"\nkeys_dir = "/keys"\n')
    assert [(problem.field, problem.message) for problem in found] == [
        ("security.bulk", "expected one of digest, sealed; found the text 'plain'")
    ]
    found = refused(LEAST + '[security]\nbulk = "sealed"\n')
    assert [problem.field for problem in found] == ["security.bulk"]
    assert "expected keys" in found[0].message
    assert parse_config(LEAST, origin="c.toml").config.bulk_mode == "digest"


def test_trainers_come_in_from_elsewhere_under_keys_only() -> None:
    assert parse_config(LEAST, origin="").config.trainers_address is None
    near = parse_config(LEAST + '[trainers]\naddress = "127.0.0.1:7500"\n', origin="").config
    assert near.trainers_address == "127.0.0.1:7500"
    (problem,) = refused(LEAST + '[trainers]\naddress = "0.0.0.0:7500"\n')
    assert problem.field == "trainers.address"
    assert "expected keys, since others can reach 0.0.0.0:7500" in problem.message
    (problem,) = refused(LEAST + '[trainers]\naddress = "tcp://127.0.0.1:7500"\n')
    assert problem.field == "trainers.address"


def test_what_a_file_leaves_out_has_its_default() -> None:
    loaded = parse_config(LEAST, origin="c.toml")
    config = loaded.config
    assert (config.group_size, config.epoch, config.budget_bytes, config.slots) == (8, 1, None, 2)
    assert (config.chunk_bytes, config.closed_job_s, config.engine) == (1 << 20, 86400, "auto")
    assert (config.keys_dir, config.http_address, config.socket) == (None, None, None)
    assert loaded.origins["memory.budget"] == "default"
    assert parse_config(LEAST.replace("parity = 1", "parity = 0"), origin="").config.parity == 0


def test_environment_wins_over_the_file_and_flags_over_both() -> None:
    environment = {"HOLDFAST_MEMORY_BUDGET": "1GiB", "HOLDFAST_MEMORY_SLOTS": "4", "HOLDFAST_SOCKET": "/s", "PATH": "x"}
    flags = {"memory.slots": "5", "http.address": "[::1]:80"}
    loaded = parse_config(GOOD, origin="c.toml", environment=environment, flags=flags)
    assert (loaded.config.budget_bytes, loaded.config.slots, loaded.config.socket) == (1 << 30, 5, "/s")
    assert loaded.origins["memory.budget"] == "environment HOLDFAST_MEMORY_BUDGET"
    assert loaded.origins["memory.slots"] == "flag --slots"
    assert loaded.origins["http.address"] == "flag --http-address"
    assert loaded.origins["daemon.socket"] == "environment HOLDFAST_SOCKET"
    assert loaded.origins["cluster.epoch"] == "file c.toml"


def test_an_empty_variable_counts_as_unset_and_others_are_not_ours() -> None:
    environment = {"HOLDFAST_MEMORY_SLOTS": "", "HOLDFAST_NODE": "a", "HOLDFAST_WHATEVER": "1"}
    assert parse_config(GOOD, origin="", environment=environment).config.slots == 3


def test_five_mistakes_are_five_problems_with_field_names() -> None:
    problems = refused(FIVE_MISTAKES)
    assert sorted(problem.field for problem in problems) == [
        "cluster.goup_size",
        "cluster.parity",
        "memory.budget",
        "node[2].address",
        "node[2].name",
    ]
    by_field = {problem.field: problem.message for problem in problems}
    assert "did you mean 'group_size'?" in by_field["cluster.goup_size"]
    assert "found the text 'two'" in by_field["cluster.parity"]
    assert "node[0]" in by_field["node[2].name"]


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        ('name = "x"\n', "", "cluster.name", "missing"),
        ('name = "x"', 'name = "a b"', "cluster.name", "letters"),
        ('name = "x"', "name = 3", "cluster.name", "found 3"),
        ('name = "x"', 'nam = "x"', "cluster.nam", "did you mean 'name'"),
        ("parity = 1", "parity = true", "cluster.parity", "found true"),
        ("parity = 1", 'parity = "1"', "cluster.parity", "write it without quotes"),
        ("parity = 1", "parity = -1", "cluster.parity", "0 to 254, found -1"),
        ("parity = 1", "parity = 1.5", "cluster.parity", "found 1.5"),
        ("parity = 1", "parity = 2", "cluster.parity", "number of nodes (2), found 2; set parity to at most 1"),
        ("parity = 1", "parity = 1\ngroup_size = 1", "cluster.group_size", "more than parity (1), found 1"),
        ("parity = 1", "parity = 1\nepoch = 0", "cluster.epoch", "found 0"),
        ("parity = 1", "parity = 1\nbudget = 3", "cluster.budget", "did you mean 'budget' under [memory]?"),
        ("parity = 1", "parity = 1\nzzz = 3", "cluster.zzz", "known here are name, parity"),
        ("[cluster]", "zzz = 3\n[cluster]", "zzz", "outside of any section"),
        ("[cluster]", "[clutser]", "clutser", "did you mean [cluster]?"),
        ("[cluster]", "[zzz]\n[cluster]", "zzz", "known are cluster, memory"),
        ("[cluster]", "memory = 3\n[cluster]", "memory", "expected a table [memory], found 3"),
        (NODES, "", "node", "1 to 4096 tables [[node]], found 0"),
        (NODES, NODES.replace("[[node]]", "[[nodes]]"), "nodes", "did you mean [[node]]?"),
        (NODES, "[node]\n", "node", "found a table"),
        ('name = "b"\n', "", "node[1].name", "missing"),
        ('name = "b"', 'name = "../b"', "node[1].name", "letters"),
        ('name = "b"', 'name = "a"', "node[1].name", "already node[0]'s"),
        ('"h:2"', '"h:1"', "node[1].address", "already node[0]'s"),
        ('"h:2"', '"h:two"', "node[1].address", "found 'two'"),
        ('"h:2"', '"h:0"', "node[1].address", "port of 1 to 65535"),
        ('"h:2"', '"h:65536"', "node[1].address", "found '65536'"),
        ('"h:2"', '"h"', "node[1].address", "host:port"),
        ('"h:2"', '"::1:7000"', "node[1].address", "IPv6 as"),
        ('"h:2"', "7000", "node[1].address", "found 7000"),
        ('"h:2"', '"h:2"\ndomain = ""', "node[1].domain", "not blank"),
        ('"h:2"', '"h:2"\ndomian = "r"', "node[1].domian", "did you mean 'domain'"),
        ("[[node]]", "[memory]\nbudget = 8\n[[node]]", "memory.budget", "2 x 1MiB), found 8B"),
        ("[[node]]", '[memory]\nbudget = "8GB"\n[[node]]', "memory.budget", "did you mean GiB?"),
        ("[[node]]", "[memory]\nslots = 1\n[[node]]", "memory.slots", "from 2 to 64, found 1"),
        ("[[node]]", '[memory]\nchunk_bytes = "3MiB"\n[[node]]', "memory.chunk_bytes", "power of two"),
        ("[[node]]", '[daemon]\nengine = "gpu"\n[[node]]', "daemon.engine", "one of auto, native"),
        ("[[node]]", '[http]\naddress = "on"\n[[node]]', "http.address", "host:port"),
        ("[[node]]", '[security]\nkeys_dir = " "\n[[node]]', "security.keys_dir", "not blank"),
        ('"x"', '"x', "line 2", "not TOML: "),
        ("parity = 1", "parity = 1\nparity = 2", "line 4", "Cannot overwrite a value"),
        ("parity = 1", "parity = " + "[" * 5000, "line", "not TOML: "),
        ("parity = 1", "parity = " + "9" * 5000, "line", "not TOML: "),
    ],
)
def test_one_mistake_is_one_problem(old: str, new: str, field: str, words: str) -> None:
    assert old in LEAST
    (problem,) = refused(LEAST.replace(old, new, 1))
    assert problem.field == field or (field == "line" and problem.field.startswith("line "))
    assert words in problem.message


def test_nodes_that_are_no_tables_are_refused() -> None:
    (problem,) = refused('node = 3\n[cluster]\nname = "x"\n')
    assert str(problem) == "node: expected tables [[node]], found 3; write [[node]] for each"


def test_both_rules_that_parity_breaks_are_reported() -> None:
    fields = [problem.field for problem in refused(LEAST.replace("parity = 1", "parity = 4\ngroup_size = 3"))]
    assert fields == ["cluster.parity", "cluster.group_size"]


def test_an_unplaceable_cluster_is_refused() -> None:
    nodes = "".join(f'[[node]]\nname = "n{index}"\naddress = "h:{index + 1}"\n' for index in range(300))
    (problem,) = refused(f'[cluster]\nname = "x"\nparity = 200\ngroup_size = 255\n{nodes}')
    assert problem.field == "cluster.group_size"
    assert "need a group of 300" in problem.message


def test_problems_of_the_environment_and_of_flags_name_their_source() -> None:
    problems = refused(
        LEAST,
        environment={"HOLDFAST_MEMORY_BUGDET": "1", "HOLDFAST_MEMORY_SLOTS": "many"},
        flags={"cluster.epoch": "x", "memory.zzz": "1"},
    )
    by_field = {problem.field: problem.message for problem in problems}
    assert set(by_field) == {"environment HOLDFAST_MEMORY_BUGDET", "memory.slots", "cluster.epoch", "memory.zzz"}
    assert "did you mean HOLDFAST_MEMORY_BUDGET?" in by_field["environment HOLDFAST_MEMORY_BUGDET"]
    assert "environment HOLDFAST_MEMORY_SLOTS" in by_field["memory.slots"]
    assert "flag --epoch" in by_field["cluster.epoch"]


def test_a_file_of_another_kind_does_not_fill_the_screen() -> None:
    with pytest.raises(ConfigError, match="and 152 more") as caught:
        parse_config("".join(f"key{index} = 1\n" for index in range(200)), origin="x")
    assert len(caught.value.problems) == 202
    assert len(str(caught.value).splitlines()) < 60


@given(st.text(max_size=200))
def test_any_text_is_refused_with_problems(text: str) -> None:
    with pytest.raises(ConfigError):  # a section and a node are more than 200 characters of chance
        parse_config(text, origin="c.toml")


def test_a_record_is_checked_when_it_is_built() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(parity=-1, slots=1, engine=None)
    assert [problem.field for problem in caught.value.problems] == ["cluster.parity", "memory.slots", "daemon.engine"]
    with pytest.raises(ConfigError, match="found 0"):
        config_of(nodes=())
    with pytest.raises(FrozenInstanceError):
        config_of().parity = 3  # type: ignore[misc]  # that it can't be assigned is the point


def test_a_config_knows_its_groups_nodes_and_sockets() -> None:
    config = config_of(socket="/run/{node}.sock")
    assert config.placement().groups == ((0, 1, 2),)
    assert config.index_of("b") == 1
    assert config.socket_of("b") == "/run/b.sock"
    assert config_of().socket_of("b") is None
    named = parse_config(GOOD, origin="").config
    with pytest.raises(OperatorError, match="did you mean 'beta'") as caught:
        named.index_of("betta")
    assert caught.value.exit_code is ExitCode.USAGE


SAME_DIGEST: list[dict[str, object]] = [
    {"budget_bytes": 1 << 30},
    {"slots": 5},
    {"keys_dir": "/k"},
    {"socket": "/s"},
    {"engine": "numpy"},
    {"http_address": "h:1", "http_allow_remote": True},
    {"socket_group": "trainers"},
    {"closed_job_s": 1},
    {"group_size": 200},  # 3 nodes are one group of 3 all the same
]


@pytest.mark.parametrize("changes", SAME_DIGEST)
def test_the_digest_leaves_out_what_may_differ(changes: dict[str, object]) -> None:
    assert config_digest(config_of(**changes)) == config_digest(config_of())


def test_the_digest_leaves_out_addresses() -> None:
    moved = tuple(replace(node, host="elsewhere") for node in config_of().nodes)
    assert config_digest(config_of(nodes=moved)) == config_digest(config_of())


@pytest.mark.parametrize(
    "changes",
    [{"cluster_name": "y"}, {"epoch": 2}, {"parity": 1}, {"chunk_bytes": 65536}],
)
def test_the_digest_covers_what_must_be_equal(changes: dict[str, object]) -> None:
    assert config_digest(config_of(**changes)) != config_digest(config_of())


def test_the_digest_covers_the_group_size_of_larger_clusters() -> None:
    assert config_digest(config_of(group_size=2, parity=1)) != config_digest(config_of(group_size=3, parity=1))


def test_the_digest_covers_names_domains_and_order() -> None:
    nodes = config_of().nodes
    digests = {
        config_digest(config_of(nodes=changed))
        for changed in (
            nodes,
            nodes[::-1],
            (replace(nodes[0], domain="z"), *nodes[1:]),
            (replace(nodes[0], name="z"), *nodes[1:]),
        )
    }
    assert len(digests) == 4


def test_the_digest_never_changes_between_releases() -> None:
    loaded: LoadedConfig = parse_config(GOOD, origin="c.toml")
    assert config_digest(loaded.config) == "80ca3813b7b01388"


@pytest.mark.parametrize("address", ["0.0.0.0:9470", "[::]:9470", "10.0.0.1:9470", "head.example:9470"])
def test_pages_that_others_reach_must_be_wished_for(address: str) -> None:
    text = LEAST + f'[http]\naddress = "{address}"\n'
    with pytest.raises(
        ConfigError, match=r"http\.address: expected an address that only this host reaches.*allow_remote"
    ):
        parse_config(text, origin="c.toml")
    assert parse_config(text + "allow_remote = true\n", origin="c.toml").config.http_allow_remote
    allowed = parse_config(text, origin="c.toml", environment={"HOLDFAST_HTTP_ALLOW_REMOTE": "true"})
    assert allowed.config.http_address == address


def test_a_switch_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match=r"http\.allow_remote: expected true or false, found the text 'maybe'"):
        parse_config(LEAST + '[http]\nallow_remote = "maybe"\n', origin="c.toml")
