"""Writes docs/reference.md from the code: config, command line, metrics, exit codes. ``make docs``.

A test compares the file with what this prints, so the reference can't be older than the code.
"""

import argparse
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

from holdfast.cli.main import VERBS
from holdfast.daemon.shell.metrics import METRICS
from holdfast.protocol import exit_codes
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.settings import SETTINGS, format_bytes

FILE = Path(__file__).with_name("reference.md")
_SIZES = {"memory.chunk_bytes", "scrub.bandwidth"}


def main() -> None:
    """Write the file."""
    FILE.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")


def text() -> str:
    """The whole reference."""
    parts = [
        "# Reference\n\nMade from the code by `make docs`; do not edit.",
        _config(),
        _command_line(),
        _metrics(),
        _exit_codes(),
    ]
    return "\n\n".join(parts) + "\n"


def _config() -> str:
    about = _attributes(ClusterConfig)
    rows = []
    for setting in SETTINGS:
        default = setting.default
        if setting.name in _SIZES and isinstance(default, int):
            shown = format_bytes(default)
        else:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
        shown = "required" if setting.required else "-" if default is None else shown
        rows.append([f"`{setting.name}`", shown, f"`{setting.environment_name}`", about.get(setting.field, "")])
    nodes = [
        ["`name`", "unique in the cluster; also the name of its key files"],
        [
            "`address`",
            '"host:port" of the control plane; IPv6 as "[::1]:7400"; a name is looked up again while its node is away',
        ],
        ["`domain`", "what fails together with it (rack, power supply); its own name if left out"],
    ]
    return "\n\n".join(
        [
            "## Config\n\nOne TOML file, equal on every node. The environment overrides the file, flags override both.",
            _table(["setting", "default", "environment", "meaning"], rows),
            "Each `[[node]]` table, in the same order everywhere:",
            _table(["key", "meaning"], nodes),
        ]
    )


def _command_line() -> str:
    subparsers = argparse.ArgumentParser(prog="holdfast").add_subparsers()
    blocks = [
        "## Command line\n\nEvery reading verb takes `--json`; data goes to stdout, progress and errors to stderr."
    ]
    for name, (module, about) in VERBS.items():
        import_module(module).add_parser(subparsers)
        parser = subparsers.choices[name]
        blocks.append(f"### holdfast {name}\n\n{_sentence(about)}")
        blocks += _options(parser)
    return "\n\n".join(blocks)


def _options(parser: argparse.ArgumentParser) -> list[str]:
    blocks, rows = [], []
    for action in parser._actions:  # argparse has no public way to list them
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for part, inner in action.choices.items():
                blocks.append(f"#### {' '.join(inner.prog.split()[1:])}".replace("#### ", "#### holdfast "))
                summary = next((one.help for one in action._choices_actions if one.dest == part), None)
                blocks += [_sentence(summary)] if summary else []
                blocks += _options(inner)
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        value = "" if action.nargs == 0 or not action.option_strings else f" {action.metavar or action.dest.upper()}"
        rows.append([f"`{name}{value}`", (action.help or "").replace("%%", "%")])
    return ([_table(["option", "meaning"], rows)] if rows else []) + blocks


def _metrics() -> str:
    rows = [[f"`{name}`", kind, about] for name, (kind, about) in METRICS.items()]
    return "## Metrics\n\nAt `http.address` + `/metrics`, for Prometheus.\n\n" + _table(
        ["name", "type", "meaning"], rows
    )


def _exit_codes() -> str:
    source = inspect.getsource(exit_codes.ExitCode)
    about = {
        found[1]: found[2] or "" for found in re.finditer(r"^    ([A-Z_]+) = \d+(?:  # (.*))?$", source, re.MULTILINE)
    }
    rows = [[str(int(code)), about[code.name] or code.name.lower().replace("_", " ")] for code in exit_codes.ExitCode]
    rows += [["130", "interrupted"], ["141", "nobody reads the output any more"]]
    note = "Scripts may rely on them; none is ever reused. `check` has a monitor's codes of its own: 0, 1, 2, 3."
    return f"## Exit codes\n\n{note}\n\n" + _table(["code", "meaning"], rows)


def _attributes(documented: type) -> dict[str, str]:
    """Names and texts of a docstring's "Attributes" section."""
    section = (inspect.getdoc(documented) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r" {4}(\w+): (.*)$", line)
        if start is not None:
            name = start[1]
            found[name] = start[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def _sentence(about: str) -> str:
    return about[:1].upper() + about[1:] + ("" if about.endswith(".") else ".")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
