"""What a worker finds in held memory, and which epochs it therefore serves.

Covers the ledgers and the config that outlive a worker, and the one decision that is made from them at its start. A
config of a higher epoch of the same cluster is taken up beside what is held; anything else that does not fit what is
held is refused, for snapshots would be given up.
"""

import logging
import mmap
import struct
from dataclasses import dataclass, replace

import msgspec
from holdfast.coding import chunk_digest
from holdfast.daemon.core.ledger import LedgerRecord, decode_ledger
from holdfast.daemon.shell.keeping import KeeperLink, LedgerMemory, make_sealed
from holdfast.daemon.shell.keys import Keys, load_keys
from holdfast.daemon.shell.network import public_key_of
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError

log = logging.getLogger("holdfast")

_WHOLE = frozenset({"protected", "committed", "rebuilding"})  # phases of slots whose loss would be one
_CONFIG = "config-"  # and the epoch: the names of held configs
_HEADER = struct.Struct("<QQ")  # bytes, xxh3_64 of them


@dataclass(frozen=True, slots=True)
class Place:
    """One epoch that this worker serves.

    Attributes:
        config: of that epoch.
        node: this node's index in it.
        keys: by its list; None without authentication.
        ledger: the name of its ledger in held memory.
        record: what a predecessor left, None if there was none.
    """

    config: ClusterConfig
    node: int
    keys: Keys | None
    ledger: str
    record: LedgerRecord | None


def config_name(epoch: int) -> str:
    """The name under which the config of an epoch is held."""
    return f"{_CONFIG}{epoch}"


def hold_config(link: KeeperLink, config: ClusterConfig) -> None:
    """Have the keeper hold a config, so that a successor with another one can still serve this epoch."""
    payload, name = msgspec.json.encode(config), config_name(config.epoch)
    if held_config(link, config.epoch) == config:
        return
    descriptor = make_sealed("holdfast-config", _HEADER.size + len(payload))
    with mmap.mmap(descriptor, _HEADER.size + len(payload)) as mapping:
        mapping[:] = _HEADER.pack(len(payload), chunk_digest(payload)) + payload
    link.drop(name)
    link.hold(name, descriptor)


def held_config(link: KeeperLink, epoch: int) -> ClusterConfig | None:
    """The config of an epoch that is held, None if there is none that can be read."""
    descriptor = link.held.get(config_name(epoch))
    if descriptor is None:
        return None
    try:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapping:
            size_bytes, digest = _HEADER.unpack_from(mapping, 0)
            payload = mapping[_HEADER.size : _HEADER.size + size_bytes]
        if chunk_digest(payload) != digest:
            return None
        return msgspec.json.decode(payload, type=ClusterConfig)
    except (OSError, ValueError, struct.error, msgspec.DecodeError, OperatorError) as error:
        log.warning("the held config of epoch %d can't be read: %s", epoch, error)
        return None


def config_for(link: KeeperLink, config: ClusterConfig, name: str) -> ClusterConfig:
    """The config to serve: that of the file, or, where it does not name this node any more, the one that it had.

    Raises:
        OperatorError: this node is in neither (exit code 2).
    """
    if name in [one.name for one in config.nodes]:
        return config
    for record in sorted(_records(link).values(), key=lambda one: -one.epoch):
        old = held_config(link, record.epoch)
        if old is not None and record.cluster == config.cluster_name and old.nodes[record.node].name == name:
            log.warning(
                "node %s is not in epoch %d: it goes on in epoch %d. Stop it when 'holdfast status' elsewhere says "
                "that nobody serves that one any more",
                name, config.epoch, old.epoch,
            )  # fmt: skip
            return old
    config.index_of(name)
    raise AssertionError("index_of has raised")


def places(link: KeeperLink, config: ClusterConfig, name: str) -> list[Place]:
    """The epochs that a worker serves: that of its config first, then the one before, if its snapshots are held.

    Args:
        link: to the keeper.
        config: what the file says now.
        name: of this node.

    Raises:
        OperatorError: snapshots are held that this config would give up (exit code 5), or its keys are not good.
    """
    found = _records(link)
    mine = next((key for key, record in found.items() if _belongs(record, config, name)), None)
    others = {key: record for key, record in found.items() if key != mine and _worth_keeping(record, config)}
    record = found[mine] if mine is not None else None
    node = config.index_of(name)
    keys = load_keys(config, node, public_of=public_key_of)
    free = mine or ("ledger" if "ledger" not in others else f"ledger-{config.epoch}")
    current = Place(config, node, keys, free, record)
    if not others:
        return [current]
    if len(others) > 1:
        epochs = sorted(one.epoch for one in others.values())
        raise _refused(f"snapshots of epochs {epochs} are held, and one change must end before the next begins")
    ((ledger, before),) = others.items()
    return [current, _earlier(link, config, name, ledger, before)]


def _earlier(link: KeeperLink, config: ClusterConfig, name: str, ledger: str, before: LedgerRecord) -> Place:
    expected = (config.cluster_name, config.epoch, config.index_of(name))
    found = (before.cluster, before.epoch, before.node)
    if before.cluster != config.cluster_name or before.epoch >= config.epoch:
        raise _refused(_other_memory(expected, found))
    old = held_config(link, before.epoch)
    if old is None or before.node >= len(old.nodes) or old.nodes[before.node].name != name:
        text = f"{_other_memory(expected, found)}, and no config of this node for that epoch is held beside them"
        raise _refused(text)
    now = {one.name: one for one in config.nodes}
    nodes = tuple(replace(one, host=now[one.name].host, port=now[one.name].port) if one.name in now else one
                  for one in old.nodes)  # fmt: skip
    served = replace(
        config,
        nodes=nodes,
        epoch=old.epoch,
        parity=old.parity,
        group_size=old.group_size,
        chunk_bytes=old.chunk_bytes,
        slots=old.slots,
    )
    keys = load_keys(served, before.node, public_of=public_key_of)
    return Place(served, before.node, keys, ledger, before)


def _records(link: KeeperLink) -> dict[str, LedgerRecord]:
    """The ledgers that are held and can be read, by their names."""
    found = {}
    for key in [key for key in link.held if key == "ledger" or key.startswith("ledger-")]:
        payload = LedgerMemory(link, key).read()
        if payload is None:
            continue
        try:
            found[key] = decode_ledger(payload)
        except msgspec.DecodeError as error:
            log.error("a ledger in held memory can't be read (%s); it is left alone, as if there were none", error)
    return found


def _worth_keeping(record: LedgerRecord, config: ClusterConfig) -> bool:
    """Whether there is anything of another epoch or cluster that a worker must serve, or not start."""
    if any(slot.phase in _WHOLE for job in record.jobs for slot in job.slots):
        return True
    follows = record.cluster == config.cluster_name and record.epoch < config.epoch
    if not (follows and record.jobs):
        log.warning("held memory of cluster %s, epoch %d: no snapshot is in it", record.cluster, record.epoch)
        return False
    return True


def _belongs(record: LedgerRecord, config: ClusterConfig, name: str) -> bool:
    return (record.cluster, record.epoch, record.node) == (config.cluster_name, config.epoch, config.index_of(name))


def _other_memory(expected: tuple[str, int, int], found: tuple[str, int, int]) -> str:
    """Why a worker leaves alone what its keeper holds."""
    names = ("cluster", "epoch", "node index")
    differ = [
        f"{name} {theirs!r} (this config: {ours!r})"
        for name, ours, theirs in zip(names, expected, found, strict=True)
        if ours != theirs
    ]
    return f"the memory held here has snapshots of {', '.join(differ)}"


def _refused(text: str) -> OperatorError:
    return OperatorError(
        ExitCode.WRONG_CLUSTER,
        f"{text}: with this config they would be given up. Give the old config back to keep them; to give them up, "
        "stop the daemon and start it again",
    )
