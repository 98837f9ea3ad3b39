"""Raw values, their origins, and names that no setting has. Most of it is tested through the config."""

from holdfast.protocol.sources import (
    Problem,
    from_environment,
    from_file,
    from_flags,
    mistyped,
    syntax_problem,
    unknown_names,
)


def test_a_file_gives_raw_values_and_ignores_what_it_does_not_know() -> None:
    document = {"cluster": {"name": "x", "zzz": 1}, "memory": 3, "node": []}
    assert from_file(document, "f") == {"cluster.name": ("x", "file f")}


def test_only_numbers_become_numbers() -> None:
    problems: list[Problem] = []
    given = from_environment({"HOLDFAST_CLUSTER_PARITY": " 2 ", "HOLDFAST_CLUSTER_NAME": "2"}, problems)
    assert (given["cluster.parity"][0], given["cluster.name"][0]) == (2, "2")
    assert from_flags({"cluster.epoch": "-3", "memory.slots": "3.0"}, problems) == {
        "cluster.epoch": (-3, "flag --epoch"),
        "memory.slots": ("3.0", "flag --slots"),
    }
    assert problems == []


def test_two_variables_for_one_setting_must_agree() -> None:
    problems: list[Problem] = []
    from_environment({"HOLDFAST_SOCKET": "/a", "HOLDFAST_DAEMON_SOCKET": "/a"}, problems)
    assert problems == []
    from_environment({"HOLDFAST_SOCKET": "/a", "HOLDFAST_DAEMON_SOCKET": "/b"}, problems)
    (problem,) = problems
    assert problem.field == "daemon.socket"
    assert "HOLDFAST_SOCKET" in problem.message
    assert "HOLDFAST_DAEMON_SOCKET" in problem.message


def test_a_line_is_found_in_the_words_of_the_parser() -> None:
    found = syntax_problem("x", "Invalid value (at line 7, column 3)")
    assert str(found) == "line 7: not TOML: Invalid value at column 3; correct the line"
    assert syntax_problem("a\nb\nc", "Unterminated string (at end of document)").field == "line 3"
    assert syntax_problem("", "Something new").field == "line 1"


def test_a_mistyped_name_is_there_under_another_one() -> None:
    assert mistyped({"clutser": {}}, "cluster", "name")
    assert mistyped({"nodes": []}, "node")
    assert mistyped({"cluster": {"nmae": 1}}, "cluster", "name")
    assert mistyped({"cluster": 3}, "cluster", "name")
    assert not mistyped({"clutser": 3}, "cluster", "name")
    assert not mistyped({"cluster": {}}, "cluster", "name")
    assert not mistyped({}, "node")
    assert not mistyped({"node": 3}, "node")


def test_known_names_are_no_problem() -> None:
    assert unknown_names({"cluster": {"name": 1}, "node": 3}) == []
