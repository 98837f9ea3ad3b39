"""How a status reads: the verdict first, then jobs and nodes."""

from typing import Any

from holdfast.cli.status import headline, picture, render, stripe_map


def status(**changes: Any) -> dict[str, Any]:
    """A cluster of two nodes with one job, as a daemon tells it."""
    held = {
        "committed_step": 7,
        "staged_step": 7,
        "whole": True,
        "lost_bytes": 0,
        "rebuilt_bytes": 0,
        "rebuild": "",
        "ranks": [0],
        "digest_failures": 0,
    }
    node = {"address": "127.0.0.1:1", "domain": "d", "group": 0, "state": "up", "reason": "", "incarnation": 1}
    node |= {"worker_session": 1, "arena_bytes": 3 << 20, "budget_bytes": 8 << 20, "engine": "native"}
    whole: dict[str, Any] = {
        "schema": "holdfast.status/1",
        "cluster": "lab",
        "epoch": 1,
        "parity": 1,
        "groups": [["a", "b"]],
        "seen_by": "a",
        "collector": "a",
        "verdict": "HEALTHY",
        "reason": "",
        "more_losses": 1,
        "jobs": [
            {
                "name": "gpt",
                "attempt": 1,
                "committed_step": 7,
                "committed_attempt": 1,
                "ranks": 2,
                "closed": False,
                "protect_s": 0.25,
                "digest_failures": 0,
                "lost_nodes": [],
                "snapshot_bytes": 2 << 20,
                "more_losses": 1,
                "verdict": "HEALTHY",
                "reason": "",
            }
        ],
        "nodes": [
            node | {"name": "a", "index": 0, "jobs": {"gpt": dict(held)}},
            node | {"name": "b", "index": 1, "jobs": {"gpt": dict(held)}},
        ],
    }
    return whole | changes


def test_render_reads_as_expected() -> None:
    assert render(status()) == "\n".join(
        [
            "HEALTHY  1 more node can be lost in every group",
            "",
            "  cluster  lab, epoch 1, parity 1",
            "  seen by  a, collector a",
            "  coding   native",
            "",
            "  job  verdict  committed  ranks  snapshot  protect  more losses",
            "  gpt  HEALTHY  step 7     2      2.0 MiB   0.25 s   1",
            "",
            "  node  group  state  address      arena               holds",
            "  a     0      up     127.0.0.1:1  3.0 MiB of 8.0 MiB  gpt: step 7",
            "  b     0      up     127.0.0.1:1  3.0 MiB of 8.0 MiB  gpt: step 7",
        ]
    )


def test_losses_and_rebuilds_are_shown_in_the_node_s_row() -> None:
    changed = status()
    changed["nodes"][0]["jobs"]["gpt"] |= {"lost_bytes": 4 << 20}
    changed["nodes"][1]["jobs"]["gpt"] |= {"lost_bytes": 4 << 20, "rebuilt_bytes": 1 << 20, "rebuild": "running"}
    text = render(changed)
    assert "gpt: LOST 4.0 MiB; 'holdfast recover' rebuilds it" in text
    assert "gpt: rebuilding, 25% of 4.0 MiB" in text


def test_a_refused_peer_says_why_in_its_row() -> None:
    changed = status()
    changed["nodes"][1] |= {"state": "refused", "reason": "expected epoch 1, found 2", "jobs": {}}
    assert "refused: expected epoch 1, found 2" in render(changed)


def test_who_has_an_old_view_of_a_node_is_named_below() -> None:
    changed = status()
    changed["nodes"][1]["old_views"] = [{"node": "a", "problem": "dials 127.0.0.1:1, it is at 127.0.0.1:2"}]
    assert render(changed).endswith("\n\n  old views\n    a of b  dials 127.0.0.1:1, it is at 127.0.0.1:2")


def test_who_makes_up_for_absent_nodes_and_who_can_not_is_said() -> None:
    told = status()
    row = {"nodes": ["c"], "kept_by": ["a", "b"], "state": "done", "done_chunks": 0, "total_chunks": 0, "problem": ""}
    shown = {
        "done": "job gpt: absent nodes: c made up for by a, b",
        "running": "job gpt: absent nodes: making up for c: 3 of 8 chunks",
        "failed": "job gpt: absent nodes: c NOT made up for: a: no memory",
    }
    for state, text in shown.items():
        told["jobs"][0]["reprotection"] = (
            row
            | {"state": state, "done_chunks": 3, "total_chunks": 8}
            | ({"problem": "a: no memory"} if state == "failed" else {})
        )
        assert f"  {text}\n" in render(told)
    told["jobs"][0]["reprotection"] = None
    assert "absent" not in render(told)


def test_headline_counts_losses() -> None:
    assert headline(status(more_losses=0, verdict="UNPROTECTED", reason="b lost")) == (
        "UNPROTECTED  no node can be lost\n  b lost"
    )
    assert headline(status(more_losses=2)) == "HEALTHY  2 more nodes can be lost in every group"
    assert "not known" in headline(status(more_losses=None))


def test_the_map_has_a_column_per_node_that_fills_up() -> None:
    changed = status(parity=1, groups=[["a", "b", "c", "d"]])
    node = changed["nodes"][0]
    half = {"gpt": node["jobs"]["gpt"] | {"lost_bytes": 100, "rebuilt_bytes": 50, "rebuild": "running"}}
    changed["nodes"] = [node, node | {"name": "b", "jobs": half}, node | {"name": "c", "state": "down", "jobs": {}}]
    changed["nodes"].append(node | {"name": "d"})
    assert stripe_map(changed).splitlines()[1:] == [
        "  group 0  a  b  c  d",
        "  0        P  D  .  D",
        "  1        D  P  .  D",
        "  2        D  x  .  D",
        "  3        D  x  .  P",
    ]


def test_a_picture_is_written_over_the_one_before() -> None:
    shown = picture(status(), colour=True)
    assert shown.startswith("\x1b[H\x1b[1;32mHEALTHY\x1b[0m  1 more")
    assert shown.endswith("\x1b[J")
    plain = picture(status(), colour=False).replace("\x1b[H", "").replace("\x1b[K", "").replace("\x1b[J", "")
    assert plain == f"{render(status())}\n\n{stripe_map(status())}\n"
