"""A cluster's config from what Kubernetes says: the pods of a StatefulSet by their names, or a list of its nodes.

Covers the name of the own pod, the names of all pods behind a headless Service, and `kubectl get nodes -o json`.
Nothing here asks the API server: a pod's name tells its slot, the number of replicas is given, and DNS tells where the
pods are. Source: the StatefulSet's documentation, "Stable Network ID": $(pod name).$(service name).
"""

import argparse
import ipaddress
import json
import re
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.cli import made_config
from holdfast.cli.made_config import MadeNode, Source
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError

NODES_FILE_BYTES_MAX = 256 << 20  # kubectl says some 20 kB of a node
FOUND_AFTER_S_MAX = 120.0  # a new pod's name is known after seconds; who waits longer has no such Service
_LOOK_S = 0.5

_POD = re.compile(r"(?P<name>[a-z0-9]([a-z0-9-]*[a-z0-9])?)-(?P<ordinal>\d{1,9})")


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of a StatefulSet.

    Attributes:
        stateful_set: the set's name, and by default that of its Service.
        ordinal: which of the set's pods, from 0.
    """

    stateful_set: str
    ordinal: int


def read_pod(environment: Mapping[str, str], *, host: str) -> Pod:
    """This pod, by POD_NAME or else by its host name.

    Raises:
        OperatorError: it is no pod of a StatefulSet (exit code 2).
    """
    name = environment.get("POD_NAME") or host
    found = _POD.fullmatch(name)
    if found is None:
        raise OperatorError(
            ExitCode.USAGE,
            f"expected the name of a StatefulSet's pod, such as holdfast-0, as POD_NAME or as host name, found "
            f"{name!r}; set POD_NAME from metadata.name (with hostNetwork the host name is the node's), or give "
            "--config FILE",
        )
    return Pod(found["name"], int(found["ordinal"]))


def pods(stateful_set: str, slots: int | None) -> list[MadeNode]:
    """The nodes that a StatefulSet's pods are: each its own slot and failure domain, under its name in DNS.

    Raises:
        OperatorError: nobody said how many there are (exit code 2).
    """
    if slots is None:
        raise OperatorError(
            ExitCode.USAGE, "--slots: expected the StatefulSet's number of replicas, found nothing; give --slots N"
        )
    names = [f"{stateful_set}-{ordinal}" for ordinal in range(slots)]
    return [MadeNode(name, f"{name}.{stateful_set}", ordinal, name) for ordinal, name in enumerate(names)]


def text_of(args: argparse.Namespace, pod: Pod) -> str:
    """The config of the StatefulSet that a pod is of, for a command's options.

    Raises:
        OperatorError: the pod is none of the slots, or an option is wrong (exit code 2).
    """
    nodes = pods(pod.stateful_set, args.slots)
    if pod.ordinal >= len(nodes):
        raise OperatorError(
            ExitCode.USAGE,
            f"--slots: expected more than {pod.ordinal}, since this is pod {pod.stateful_set}-{pod.ordinal}, found "
            f"{args.slots}; give every pod the StatefulSet's number of replicas",
        )
    return _text(args, nodes, Source("a StatefulSet", pod.stateful_set))


def text_of_set(args: argparse.Namespace) -> str:
    """The same from anywhere, for `config kubernetes`: of a StatefulSet, or of a list of nodes."""
    if args.nodes_json is None:
        return _text(args, pods(args.name, args.slots), Source("a StatefulSet", args.name))
    if args.slots is not None:
        raise OperatorError(ExitCode.USAGE, "--slots: expected none beside --nodes-json, which lists the nodes")
    nodes = read_nodes(_read(args.nodes_json), domain_label=args.domain_label)
    return _text(args, nodes, Source("a list of Kubernetes nodes", args.name))


def _text(args: argparse.Namespace, nodes: Sequence[MadeNode], source: Source) -> str:
    keys_dir = made_config.keys_dir_of(args)
    return made_config.config_text(nodes, source, parity=args.parity, address=args.address, keys_dir=keys_dir)


def read_nodes(text: str, *, domain_label: str | None) -> list[MadeNode]:
    """The nodes of `kubectl get nodes -o json`, by name: whoever makes the config makes the same one.

    Raises:
        OperatorError: it is no such list, or a node has no internal address or not the label (exit code 2).
    """
    try:
        items: list[dict[str, Any]] = json.loads(text)["items"]
        rows = sorted((item["metadata"]["name"], item) for item in items)
        found = []
        for index, (name, item) in enumerate(rows):
            own = [one["address"] for one in item["status"]["addresses"] if one["type"] == "InternalIP"]
            labels = item["metadata"].get("labels", {})
            found.append((index, name, own, labels.get(domain_label) if domain_label is not None else name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OperatorError(
            ExitCode.USAGE, "--nodes-json: expected what 'kubectl get nodes -o json' prints, found something else"
        ) from error
    if not found:
        raise OperatorError(
            ExitCode.USAGE, "--nodes-json: expected at least one node, found none; look at the selector"
        )
    for _, name, own, domain in found:
        if not own or domain is None:
            lacking = "an address of type InternalIP" if not own else f"the label {domain_label}"
            raise OperatorError(ExitCode.USAGE, f"--nodes-json: expected {lacking}, found node {name} without one")
    return [MadeNode(name, _bracketed(own[0]), index, str(domain)) for index, name, own, domain in found]


def _bracketed(address: str) -> str:
    """An address as it stands before a port."""
    try:
        return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    except ValueError:
        return address


def _read(file: Path) -> str:
    try:
        with (Path("/dev/stdin") if str(file) == "-" else file).open("rb") as stream:
            content = stream.read(NODES_FILE_BYTES_MAX + 1)
        if len(content) > NODES_FILE_BYTES_MAX:
            raise OperatorError(ExitCode.USAGE, f"--nodes-json: expected at most {NODES_FILE_BYTES_MAX} bytes")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(ExitCode.USAGE, f"--nodes-json: can't read {file}: {error}") from error


def wait_for_own_name(config: ClusterConfig, node: str, *, seconds: float = FOUND_AFTER_S_MAX) -> None:
    """Wait until DNS knows where this pod is: a pod runs before its name is published.

    Raises:
        OperatorError: it does not within `seconds` (exit code 2).
    """
    host = next(known.host for known in config.nodes if known.name == node)
    deadline_s = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise OperatorError(
                    ExitCode.USAGE,
                    f"expected DNS to know this pod as {host} within {seconds:.0f} s, found: {error}. Does the "
                    "StatefulSet's serviceName name a headless Service with publishNotReadyAddresses: true? Another "
                    "Service than one of the set's name wants --address, such as '{host}.NAMESPACE.svc:7400'",
                ) from error
        else:
            return
        time.sleep(_LOOK_S)


def folder_of(args: argparse.Namespace, pod: Pod) -> Path:
    """This pod's folder for its config."""
    given: Path | None = args.dir
    return given or Path(tempfile.gettempdir()) / f"holdfast-{pod.stateful_set}"
