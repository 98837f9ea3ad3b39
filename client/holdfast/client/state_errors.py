"""What can go wrong between a rank's live state and its shard; whose fault it is, is the type."""


class ShardError(Exception):
    """Base of every error about a rank's state as bytes."""


class StateError(ShardError):
    """The state holds something that cannot be staged or put back; the text names its path."""


class LayoutChangedError(ShardError):
    """The live state no longer fits the layout: build a new one (a new plan) and capture again."""


class TornSnapshotError(ShardError):
    """A tensor changed during its copy in the background: the shard must be discarded."""


class RestoreMismatchError(ShardError):
    """A shard does not fit the live state it should be put into; nothing live was changed."""


class RottenShardError(ShardError):
    """Bytes of a shard changed where they lay; the live state may be half overwritten, until it is restored again."""


class MalformedShardError(ShardError):
    """Bytes that are no shard, are cut short, or contradict themselves; none were used."""
