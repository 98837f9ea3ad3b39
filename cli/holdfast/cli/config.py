"""`holdfast config`: a config file read as a daemon would read it, without starting one; or made from a Slurm job."""

import argparse
import os
import socket
from pathlib import Path

from holdfast.cli import kubernetes, made_config, slurm
from holdfast.cli.arguments import Subparsers, add_json_flag
from holdfast.cli.output import emit, emit_json, pairs, table
from holdfast.coding import EngineUnavailableError, select_engine
from holdfast.protocol.config import ClusterConfig, ConfigError, LoadedConfig, config_digest, parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.settings import SETTINGS, format_bytes
from holdfast.protocol.trust import exposed_nodes

CONFIG_FILE_BYTES_MAX = 4 << 20  # 4096 nodes take less than 1 MiB; what is larger is another kind of file

_SHOWN_AS_SIZE = {"memory.budget", "memory.chunk_bytes", "scrub.bandwidth"}
_SHOWN_WHEN_NONE = {
    "memory.budget": "auto",
    "security.keys_dir": "none",
    "http.address": "off",
    "trainers.address": "off",
    "daemon.socket_group": "none",
    "daemon.state_dir": "socket's folder",
    "durable.dir": "off",
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the verb and its two parts."""
    parser = subparsers.add_parser("config", help="check a config file, or show its values and their origins")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    for name, summary in (
        ("check", "exit 0 if a daemon would take the file, else 2 with all that is wrong"),
        ("show", "every value and where it came from: default, file or environment"),
    ):
        part = parts.add_parser(name, help=summary, description=summary)
        part.add_argument("file", type=Path, metavar="FILE", help="the cluster's TOML file")
        add_json_flag(part)
    from_slurm = parts.add_parser(
        "slurm",
        help="print the config of this Slurm job, or --write it for this host's daemon",
        description="The config of this Slurm job's hosts. With --write it goes where 'holdfast daemon --from-slurm' "
        "on this host reads it; 'holdfast upgrade' then takes it up.",
    )
    made_config.add_options(from_slurm)
    slurm.add_options(from_slurm)
    from_slurm.add_argument("--write", action="store_true", help="replace the config of this host's daemon")
    from_kubernetes = parts.add_parser(
        "kubernetes",
        help="print the config of a StatefulSet's pods, or of a list of Kubernetes nodes",
        description="The config that 'holdfast daemon --from-kubernetes' makes in each pod of a StatefulSet of that "
        "name, or one of the nodes that 'kubectl get nodes -o json' prints.",
    )
    made_config.add_options(from_kubernetes)
    add = from_kubernetes.add_argument
    add("--name", default="holdfast", metavar="NAME", help="of the StatefulSet, and of the cluster [holdfast]")
    add("--nodes-json", type=Path, metavar="FILE", help="what 'kubectl get nodes -o json' printed; -: standard input")
    add("--domain-label", metavar="L", help="nodes with the same value of this label are lost together [none are]")


def run(args: argparse.Namespace) -> int:
    """Run the part that was asked for."""
    if args.part == "kubernetes":
        emit(kubernetes.text_of_set(args).rstrip())
        return int(ExitCode.DONE)
    if args.part == "slurm":
        return _slurm(args)
    if args.part == "check":
        return _check(args.file, as_json=args.json)
    loaded = read_config(args.file)
    if args.json:
        emit_json("holdfast.config/1", _as_json(loaded))
    else:
        emit(_as_text(loaded))
    return int(ExitCode.DONE)


def read_config(file: Path) -> LoadedConfig:
    """Read a config file with this process's environment over it.

    Raises:
        ConfigError: what it says is refused.
        OperatorError: it can't be read (exit code 2).
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(CONFIG_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise OperatorError(
            ExitCode.USAGE, f"can't read the config {file}: {error.strerror}; give the path of the cluster's TOML file"
        ) from error
    if len(content) > CONFIG_FILE_BYTES_MAX:
        raise OperatorError(
            ExitCode.USAGE,
            f"{file} has more than {format_bytes(CONFIG_FILE_BYTES_MAX)}, which no config has; "
            "give the path of the cluster's TOML file",
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OperatorError(
            ExitCode.USAGE, f"{file} is not UTF-8 text (byte {error.start}); give the path of the cluster's TOML file"
        ) from error
    return parse_config(text, origin=str(file), environment=os.environ)


def _slurm(args: argparse.Namespace) -> int:
    allocation = slurm.read_allocation(os.environ, host=socket.gethostname().partition(".")[0])
    text, assigned = slurm.text_of(args, allocation)
    if args.write and allocation.own in assigned:
        emit(str(made_config.write_config(slurm.folder_of(args, allocation), allocation.own, text)))
    elif not args.write:
        emit(text.rstrip())
    return int(ExitCode.DONE)


def _check(file: Path, *, as_json: bool) -> int:
    if not as_json:
        loaded = read_config(file)
        emit(f"{file}: good. {_summary(loaded)}")
        for warning in _warnings(loaded):
            emit(f"  warning: {warning}")
        return int(ExitCode.DONE)
    try:
        loaded = read_config(file)
    except ConfigError as error:
        problems = [{"field": problem.field, "message": problem.message} for problem in error.problems]
        emit_json("holdfast.config-check/1", {"file": str(file), "good": False, "problems": problems, "warnings": []})
        return int(error.exit_code)
    warnings = _warnings(loaded)
    fields = {"file": str(file), "good": True, "problems": [], "warnings": warnings}
    emit_json("holdfast.config-check/1", {**fields, "digest": config_digest(loaded.config)})
    return int(ExitCode.DONE)


def _warnings(loaded: LoadedConfig) -> list[str]:
    warnings = list(loaded.config.placement().report().warnings)
    if exposed_nodes(loaded.config):
        warnings.append(
            "no keys: a daemon will refuse to start with addresses that others can reach; make keys with "
            "'holdfast keys init' and set security.keys_dir"
        )
    return warnings


def _summary(loaded: LoadedConfig) -> str:
    config = loaded.config
    node_count, group_count = len(config.nodes), len(config.placement().groups)
    return (
        f"Cluster {config.cluster_name!r}, epoch {config.epoch}: {node_count} node{'s' if node_count > 1 else ''} in "
        f"{group_count} group{'s' if group_count > 1 else ''}, parity {config.parity}. Digest {config_digest(config)}."
    )


def _as_json(loaded: LoadedConfig) -> dict[str, object]:
    config = loaded.config
    return {
        "digest": config_digest(config),
        "engine_here": _engine_here(config),
        "values": {
            setting.name: {"value": getattr(config, setting.field), "origin": loaded.origins[setting.name]}
            for setting in SETTINGS
        },
        "nodes": [
            {
                "index": index,
                "name": node.name,
                "address": node.address,
                "domain": node.domain,
                "domain_origin": loaded.origins[f"node[{index}].domain"],
            }
            for index, node in enumerate(config.nodes)
        ],
        "groups": [[config.nodes[node].name for node in group] for group in config.placement().groups],
    }


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _as_text(loaded: LoadedConfig) -> str:
    config = loaded.config
    rows = []
    for setting in SETTINGS:
        value = getattr(config, setting.field)
        if value is None:
            shown = _SHOWN_WHEN_NONE.get(setting.name, "default place")
        else:
            shown = format_bytes(value) if setting.name in _SHOWN_AS_SIZE else _shown(value)
        rows.append([setting.name, shown, loaded.origins[setting.name]])
    placement = config.placement()
    nodes = [
        [str(index), node.name, node.address, node.domain, str(placement.group_of(index))]
        for index, node in enumerate(config.nodes)
    ]
    return "\n".join(
        [
            table(["setting", "value", "from"], rows, indent=""),
            "",
            table(["node", "name", "address", "domain", "group"], nodes, indent=""),
            "",
            pairs(
                [
                    ("digest", f"{config_digest(config)}  (equal on all nodes of a cluster)"),
                    ("engine", _engine_here(config)),
                ],
                indent="",
            ),
        ]
    )


def _engine_here(config: ClusterConfig) -> str:
    try:
        engine = select_engine(None if config.engine == "auto" else config.engine)
    except EngineUnavailableError as error:
        return f"none on this machine: {error}"
    return f"{engine.name} on this machine ({engine.detail})"
