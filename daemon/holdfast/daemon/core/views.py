"""Who still has an old view of a node that was replaced: another address, an earlier incarnation, or a refusal.

Covers what this node tells of its own view, and the comparison of all views with what a node says of itself. The
collector hears every node; what another node can compare is what its group tells. What it tells is some heartbeats old,
so nobody is said not to have heard of what has only just begun.
"""

from collections.abc import Iterable

from holdfast.daemon.core.context import Context
from holdfast.daemon.core.peers import Peers
from holdfast.protocol import limits
from holdfast.protocol.messages import Heartbeat
from holdfast.protocol.views import ADDRESS_CHARS_MAX, REFUSAL_CHARS_MAX, PeerView


def own_views(ctx: Context, peers: Peers, nodes: Iterable[int]) -> tuple[PeerView, ...]:
    """How this node sees those nodes, itself left out."""
    return tuple(
        PeerView(
            node=node,
            incarnation=peers.table[node].incarnation,
            alive=peers.alive(node),
            address=ctx.config.nodes[node].address[:ADDRESS_CHARS_MAX],
            refused=peers.table[node].refused[:REFUSAL_CHARS_MAX],
        )
        for node in nodes
        if node != ctx.node
    )


def told_views(ctx: Context, peers: Peers) -> tuple[PeerView, ...]:
    """What this node's heartbeat tells: of those it talks to all the time."""
    return own_views(ctx, peers, sorted({*ctx.group, peers.collector}))


def old_views(ctx: Context, peers: Peers, own: Heartbeat) -> dict[int, list[dict[str, str]]]:
    """By node: who has an old view of it, and what about it is old. Only of nodes that are up."""
    beats = {ctx.node: own}
    beats |= {node: peer.heartbeat for node, peer in peers.table.items() if peers.alive(node) and peer.heartbeat}
    seen = [(ctx.node, view) for view in own_views(ctx, peers, peers.table)]
    seen += [(viewer, view) for viewer, beat in beats.items() if viewer != ctx.node for view in beat.views]
    newest = {node: peers.incarnation_of(node) for node in beats}
    for _, view in seen:
        if view.node in newest:
            newest[view.node] = max(newest[view.node], view.incarnation)
    found: dict[int, list[dict[str, str]]] = {}
    for viewer, view in seen:
        beat = beats.get(view.node)
        if beat is None or (view.alive and view.incarnation == newest[view.node] and view.address == beat.address):
            continue  # nearly all of them
        problem = _refused(view, beat.address, ctx.name_of(viewer))
        if not problem and _had_time(ctx, peers, view.node) and _had_time(ctx, peers, viewer):
            problem = _unheard(view, newest[view.node])
        if problem:
            found.setdefault(view.node, []).append({"node": ctx.name_of(viewer), "problem": problem})
    return {node: sorted(old, key=lambda one: one["node"]) for node, old in found.items()}


def _had_time(ctx: Context, peers: Peers, node: int) -> bool:
    since_ns = peers.started_ns if node == ctx.node else max(peers.started_ns, peers.table[node].since_ns)
    return ctx.now_ns >= since_ns + int(limits.VIEW_GRACE_S * 1e9)


def _refused(view: PeerView, address: str, viewer: str) -> str:
    if address and view.address != address:
        return f"dials {view.address}, it is at {address}; correct {viewer}'s config and give 'holdfast upgrade' there"
    return "" if view.alive else view.refused


def _unheard(view: PeerView, newest: int) -> str:
    if view.incarnation == 0:
        return "has not heard it yet"
    if view.incarnation < newest:
        return f"has heard incarnation {view.incarnation} only, {newest} holds the slot"
    return ""
