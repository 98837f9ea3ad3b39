"""Whether a rank's plan can be taken on this node, and why not. A pure check; what a plan changes is in `Job`."""

from dataclasses import dataclass

from holdfast.protocol import limits, messages


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a plan is refused. `retry`: the same plan may be taken in a moment."""

    text: str
    retry: bool = False


def refusal(
    plan: messages.Plan, *, attempt: int, node: int, node_count: int, group_chunks: int, held_by_another: bool
) -> Refusal | None:
    """Check a plan; None if it can be taken.

    Args:
        plan: what the rank said.
        attempt: the job's attempt as known here.
        node: this node's index.
        node_count: nodes of the cluster.
        group_chunks: data chunks that the layout gives to this node's group.
        held_by_another: the role belongs to another live process in this attempt.
    """
    places, role = plan.layout.shards, plan.role
    if plan.attempt < attempt:
        return Refusal(f"attempt {plan.attempt} is over; attempt {attempt} has begun. Restart this rank")
    if plan.attempt > attempt:
        text = f"attempt {plan.attempt} is not known here yet; it is heard from the other nodes in a moment"
        return Refusal(text, retry=True)
    if role >= len(places):
        return Refusal(f"role {role} is outside the layout of {len(places)} ranks")
    if places[role].node != node:
        return Refusal(f"the layout puts role {role} on node {places[role].node}, this daemon is node {node}")
    if any(place.node >= node_count for place in places):
        return Refusal(f"the layout names a node beyond the {node_count} of this cluster")
    if group_chunks > limits.GROUP_CHUNKS_MAX:
        text = f"the layout gives this group {group_chunks} chunks, {limits.GROUP_CHUNKS_MAX} are the limit"
        return Refusal(f"{text}; raise memory.chunk_bytes")
    if held_by_another:
        return Refusal(f"role {role} of this attempt is held by another process that is still alive", retry=True)
    return None
