"""The cluster's config: one frozen record, made from a TOML file, the environment and flags, or refused whole. Pure.

Covers where values come from, which must go together, and the digest by which daemons notice that
their files differ. Reading the file is the caller's; raw values are of `holdfast.protocol.sources`,
reading one of them of `holdfast.protocol.settings`.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from holdfast.protocol import limits, settings, sources
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.placement import Placement, PlacementError, place
from holdfast.protocol.settings import SETTINGS, Setting, describe
from holdfast.protocol.sources import Problem

__all__ = [
    "ClusterConfig",
    "ConfigError",
    "LoadedConfig",
    "NodeConfig",
    "Problem",
    "config_digest",
    "parse_config",
]

CONFIG_DIGEST_CHARS = 16  # 64 bits in hex: told apart by eye, and two files of one cluster never collide by chance
PROBLEMS_SHOWN_MAX = 50  # a file of another kind would fill the screen

_NOTHING: Mapping[str, str] = MappingProxyType({})
_PLACE = re.compile(r"/.*|(?:s3|gs|az)://[^/]+(?:/.*)?")  # of durable copies: a folder, or a place in an object store
_NODE_KEYS = ("name", "address", "domain")


class ConfigError(OperatorError):
    """A config that is refused, with all that is wrong with it. Exit code 2."""

    def __init__(self, origin: str, problems: Sequence[Problem]) -> None:
        self.origin = origin
        self.problems = tuple(problems)
        count = len(self.problems)
        shown = [f"  {problem}" for problem in self.problems[:PROBLEMS_SHOWN_MAX]]
        if count > len(shown):
            shown.append(f"  and {count - len(shown)} more")
        lines = [f"{origin}: {count} problem{'s' if count != 1 else ''}", *shown]
        these = "these" if count != 1 else "this"
        lines.append(f"Correct {these}, then try: holdfast config check {origin}")
        super().__init__(ExitCode.USAGE, "\n".join(lines))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """One node's place in the cluster.

    Attributes:
        name: unique in the cluster; also the name of its key files.
        host: a name or an IP address, IPv6 without brackets.
        port: TCP, of the control plane.
        domain: what fails together with it (rack, power supply, host); its own name if the file
            gives none.
    """

    name: str
    host: str
    port: int
    domain: str

    @property
    def address(self) -> str:
        """host:port, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """All settings of a cluster. A node's index is its place in `nodes`, which is the order of the file.

    Attributes:
        cluster_name: daemons of another cluster are refused by it.
        nodes: at least one.
        parity: node losses that each group survives (m).
        group_size: wished members per group (n); a smaller cluster is one group.
        epoch: version of the membership.
        reprotect_after_s: a node that is silent for so long gets no replacement soon: the others of its group make up
            for what it held, as far as their memory allows; 0: never.
        budget_bytes: memory that a node's arena may take, or None: decided on the node ("auto").
        slots: snapshots that a job has room for.
        chunk_bytes: unit of coding, transfer and digest; a power of two.
        closed_job_s: how long the last snapshot of a job that closed is kept.
        keys_dir: folder of the CURVE keys, or None: no authentication.
        bulk_mode: how chunks travel between nodes: "digest" (as they are, checked against announced digests) or
            "sealed" (encrypted and authenticated; needs keys and the extra holdfast[sealed]).
        http_address: host:port of the status pages, or None: off.
        http_allow_remote: whether that address may be one that other machines reach. Nothing there is authenticated.
        trainers_address: host:port where trainers may come in that can't reach the Unix socket, or None: nobody may.
        socket: path of the daemon's Unix socket, or None: the default places; may contain "{node}".
        socket_group: a group of this host whose members may attach, or None: the daemon's user and root only.
        engine: coding engine, or "auto".
        scrub_period_s: within so long every resting chunk is read again and compared with its digest; 0: never.
        scrub_bytes_per_s: what that may read per second at most, of memory; it takes longer where this is too little.
        scrub_cpu_percent: how much of one core that may use.
        state_dir: folder of recovery records, or None: beside the socket.
        drill_period_s: how often it is proven that sampled stripes can be rebuilt; 0: only when asked.
        durable_dir: absolute folder, or URL (s3, gs, az), the same for all nodes, that gets durable copies; None: none.
        durable_every_s: a copy becomes due so long after the last one; 0: time alone makes none due.
        durable_every_steps: the same in steps; 0: steps alone make none due.
        durable_keep: how many copies of a job stay there.
        durable_grace_s: how long nodes asked to stop wait for the copy of the last committed step; 0: not at all.
        durable_after_lives: a job that has begun so many lives from one step without committing a newer one begins
            the next from the durable copy before it; 0: it is only told.

    Raises:
        ConfigError: values out of their bounds or that do not go together; all of them at once.
    """

    cluster_name: str
    nodes: tuple[NodeConfig, ...]
    parity: int = 2
    group_size: int = 8
    epoch: int = 1
    reprotect_after_s: int = 0
    budget_bytes: int | None = None
    slots: int = 2
    chunk_bytes: int = 1 << 20
    closed_job_s: int = 86400
    keys_dir: str | None = None
    bulk_mode: str = "digest"
    http_address: str | None = None
    http_allow_remote: bool = False
    trainers_address: str | None = None
    socket: str | None = None
    socket_group: str | None = None
    engine: str = "auto"
    scrub_period_s: int = 600
    scrub_bytes_per_s: int = 256 << 20
    scrub_cpu_percent: int = 5
    drill_period_s: int = 600
    durable_dir: str | None = None
    durable_every_s: int = 1800
    durable_every_steps: int = 0
    durable_keep: int = 2
    durable_grace_s: int = 20
    durable_after_lives: int = 0
    state_dir: str | None = None

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        for setting in SETTINGS:
            value = getattr(self, setting.field)
            if value is not None or setting.default is not None or setting.required:
                _read_into({}, setting, value, problems, hint="")
        rows = [{"name": node.name, "address": node.address, "domain": node.domain} for node in self.nodes]
        _read_nodes(rows, problems, {})
        if not problems:
            problems = _conflicts(self)
        if problems:
            raise ConfigError("config", problems)

    def placement(self) -> Placement:
        """The groups of this cluster's nodes."""
        return place([node.domain for node in self.nodes], group_size=self.group_size, parity=self.parity)

    def index_of(self, name: str) -> int:
        """The index of the node called `name`.

        Raises:
            OperatorError: there is none (exit code 2).
        """
        for index, node in enumerate(self.nodes):
            if node.name == name:
                return index
        meant = settings.closest(name, (node.name for node in self.nodes))
        hint = f" (did you mean {meant!r}?)" if meant else ""
        raise OperatorError(
            ExitCode.USAGE,
            f"no node {name!r} among the {len(self.nodes)} nodes of cluster {self.cluster_name!r}{hint}. "
            "Give a name from the config's [[node]] tables.",
        )

    def socket_of(self, name: str) -> str | None:
        """The path of the Unix socket of the node called `name`, or None if the config leaves it open."""
        return None if self.socket is None else self.socket.replace("{node}", name)


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config and where each value came from.

    Attributes:
        config: the record.
        origins: dotted name -> "default", "file X", "environment HOLDFAST_..." or "flag --...".
    """

    config: ClusterConfig
    origins: Mapping[str, str]


def parse_config(
    text: str,
    *,
    origin: str,
    environment: Mapping[str, str] = _NOTHING,
    flags: Mapping[str, str] = _NOTHING,
) -> LoadedConfig:
    """Read a cluster's config; environment over file, flags over both.

    Args:
        text: TOML.
        origin: what to call the text in messages, usually its path.
        environment: variables; those that do not start with `HOLDFAST_` are ignored, empty ones
            count as unset.
        flags: dotted name of a setting (`memory.budget`) -> what the flag said.

    Raises:
        ConfigError: with every problem of the file, the environment and the flags together.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of numbers too long for Python, and of a thousand brackets, too
        raise ConfigError(origin, [sources.syntax_problem(text, str(error))]) from error
    problems = sources.unknown_names(document)
    given = sources.from_file(document, origin)
    given |= sources.from_environment(environment, problems)
    given |= sources.from_flags(flags, problems)
    origins: dict[str, str] = {}
    values: dict[str, object] = {}
    for setting in SETTINGS:
        if setting.name in given:
            raw, origins[setting.name] = given[setting.name]
            source = "" if origins[setting.name].startswith("file ") else f" ({origins[setting.name]})"
            _read_into(values, setting, raw, problems, hint=source)
        elif setting.required and not sources.mistyped(document, setting.section, setting.key):
            problems.append(Problem(setting.name, f"missing; add {setting.key} = ... under [{setting.section}]"))
        elif not setting.required:
            values[setting.field], origins[setting.name] = setting.default, "default"
    node_problems_before = len(problems)
    nodes: tuple[NodeConfig, ...] = ()
    if not sources.mistyped(document, "node"):
        nodes = _read_nodes(document.get("node", []), problems, origins, file=f"file {origin}")
    nodes_good = bool(nodes) and len(problems) == node_problems_before
    return _build(origin, values, nodes if nodes_good else None, problems, origins)


def config_digest(config: ClusterConfig) -> str:
    """A short digest of what must be equal on all nodes of a cluster.

    Covers cluster name, epoch, parity, group size, chunk size, and names and domains of the nodes
    in order. Leaves out what may differ from node to node: addresses, keys, budget, slots, sockets, engine;
    and the bulk mode, which every message tells.
    """
    content = [
        config.cluster_name,
        config.epoch,
        config.parity,
        min(config.group_size, len(config.nodes)),
        config.chunk_bytes,
        [[node.name, node.domain] for node in config.nodes],
    ]
    canonical = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:CONFIG_DIGEST_CHARS]


def _build(
    origin: str,
    values: Mapping[str, object],
    nodes: tuple[NodeConfig, ...] | None,
    problems: list[Problem],
    origins: Mapping[str, str],
) -> LoadedConfig:
    """Make the record, or report the problems found so far and what does not go together besides."""
    if nodes is not None and len(values) == len(SETTINGS):
        try:
            config = ClusterConfig(nodes=nodes, **cast("dict[str, str]", dict(values)))  # type: ignore[arg-type]  # by SETTINGS
        except ConfigError as error:
            problems.extend(error.problems)
        else:
            if not problems:
                return LoadedConfig(config, MappingProxyType(dict(origins)))
    raise ConfigError(origin, problems)


def _conflicts(config: ClusterConfig) -> list[Problem]:
    """Values that are good alone and wrong together."""
    problems = []
    least_bytes = config.slots * config.chunk_bytes
    if config.budget_bytes is not None and config.budget_bytes < least_bytes:
        problems.append(
            Problem(
                "memory.budget",
                f"expected room for a chunk per slot ({config.slots} x "
                f"{settings.format_bytes(config.chunk_bytes)}), "
                f'found {settings.format_bytes(config.budget_bytes)}; give a unit, such as "8GiB"',
            )
        )
    problems += _exposures(config)
    if config.durable_dir is not None and _PLACE.fullmatch(config.durable_dir) is None:
        text = "expected an absolute path, since daemons and ranks run in different folders, or s3://BUCKET/PREFIX"
        problems.append(Problem("durable.dir", f"{text}; found {config.durable_dir!r}"))
    if config.bulk_mode == "sealed" and config.keys_dir is None:
        text = "expected keys, since what seals chunks is agreed under them; found none"
        problems.append(Problem("security.bulk", f'{text}; set keys_dir under [security], or bulk = "digest"'))
    node_count = len(config.nodes)
    if node_count <= config.parity:
        problems.append(
            Problem(
                "cluster.parity",
                f"expected less than the number of nodes ({node_count}), found {config.parity}; "
                f"set parity to at most {node_count - 1}, or add nodes",
            )
        )
    if config.group_size <= config.parity:
        problems.append(
            Problem(
                "cluster.group_size",
                f"expected more than parity ({config.parity}), found {config.group_size}; "
                f"set group_size to at least {config.parity + 1}, or lower parity",
            )
        )
    if not any(problem.field.startswith("cluster.") for problem in problems):
        try:
            config.placement()
        except PlacementError as error:
            problems.append(Problem("cluster.group_size", str(error)))
    return problems


def _exposures(config: ClusterConfig) -> list[Problem]:
    """Addresses that others reach, and should not as things are."""
    problems = []
    if config.http_address is not None and not config.http_allow_remote:
        host, _ = settings.split_address(config.http_address)
        if not settings.is_loopback(host):
            problems.append(
                Problem(
                    "http.address",
                    f"expected an address that only this host reaches, such as 127.0.0.1:9470, found "
                    f"{config.http_address}; the pages ask for no password, so use loopback, or set "
                    "allow_remote = true under [http] where everybody may see them",
                )
            )
    if config.trainers_address is not None and config.keys_dir is None:
        host, _ = settings.split_address(config.trainers_address)
        if not settings.is_loopback(host):
            problems.append(
                Problem(
                    "trainers.address",
                    f"expected keys, since others can reach {config.trainers_address}, or an address of 127.0.0.0/8; "
                    "found no keys. Anybody who connects could read and replace training state: set keys_dir under "
                    "[security]",
                )
            )
    return problems


def _read_into(values: dict[str, object], setting: Setting, raw: object, problems: list[Problem], *, hint: str) -> None:
    try:
        values[setting.field] = setting.read(raw)
    except ValueError as error:
        problems.append(Problem(setting.name, f"expected {error}{hint}"))


def _read_nodes(
    rows: object, problems: list[Problem], origins: dict[str, str], *, file: str = "file"
) -> tuple[NodeConfig, ...]:
    """Read the `[[node]]` tables in order; a table with a problem is left out."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        problems.append(Problem("node", f"expected tables [[node]], found {describe(rows)}; write [[node]] for each"))
        return ()
    if not 1 <= len(rows) <= limits.NODE_COUNT_MAX:
        problems.append(
            Problem(
                "node",
                f"expected 1 to {limits.NODE_COUNT_MAX} tables [[node]], found {len(rows)}; "
                "add one with name and address for each node",
            )
        )
        return ()
    first_use: dict[tuple[str, object], int] = {}
    nodes = [_read_node(index, row, problems, first_use) for index, row in enumerate(rows)]
    for index, row in enumerate(rows):
        for key in _NODE_KEYS:
            origins[f"node[{index}].{key}"] = file if key in row else "default"
    return tuple(node for node in nodes if node is not None)


def _read_node(
    index: int,
    row: Mapping[str, object],
    problems: list[Problem],
    first_use: dict[tuple[str, object], int],
) -> NodeConfig | None:
    """Read one `[[node]]` table. `first_use` has (key, value) of earlier ones, to find what is there twice."""
    before = len(problems)

    def report(key: str, message: str) -> None:
        problems.append(Problem(f"node[{index}].{key}", message))

    for key in row:
        if key not in _NODE_KEYS:
            report(key, "unknown key" + sources.key_hint(key, _NODE_KEYS))
    found: dict[str, object] = {}
    for key, read in (
        ("name", settings.read_name),
        ("address", settings.split_address),
        ("domain", settings.read_text),
    ):
        if key not in row:
            if key != "domain":
                report(key, f"missing; add {key} = ... to this [[node]]")
            continue
        try:
            found[key] = read(row[key])
        except ValueError as error:
            report(key, f"expected {error}")
            continue
        if key != "domain" and (earlier := first_use.setdefault((key, found[key]), index)) != index:
            report(key, f"{row[key]!r} is already node[{earlier}]'s; give each node its own")
    if len(problems) > before:
        return None
    host, port = cast("tuple[str, int]", found["address"])
    name = str(found["name"])
    return NodeConfig(name=name, host=host, port=port, domain=str(found.get("domain", name)))
