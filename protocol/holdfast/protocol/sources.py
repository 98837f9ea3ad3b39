"""Where the values of a cluster's config come from: the file's tables, the environment, flags. Pure.

Covers raw values, their origins, and names that no setting has. What a value may be is the settings' own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.protocol import settings
from holdfast.protocol.settings import SETTINGS, Setting, describe

_SHORT_ENVIRONMENT = {"HOLDFAST_SOCKET": "daemon.socket"}  # what a job's environment has anyway

Given = dict[str, tuple[object, str]]  # dotted name of a setting -> raw value and its origin


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a config.

    Attributes:
        field: the dotted name (`memory.budget`, `node[2].address`), a section, or "line 3" where
            TOML itself is broken.
        message: what was expected, what was found, what to do.
    """

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def from_file(document: Mapping[str, object], origin: str) -> Given:
    """What the file's sections say. Names that no setting has are `unknown_names`'."""
    given: Given = {}
    for setting in SETTINGS:
        table = document.get(setting.section)
        if isinstance(table, dict) and setting.key in table:
            given[setting.name] = (table[setting.key], f"file {origin}")
    return given


def from_environment(environment: Mapping[str, str], problems: list[Problem]) -> Given:
    """What the variables say. Those of other programs are ignored, empty ones count as unset."""
    names = {setting.environment_name: setting for setting in SETTINGS}
    by_name = {setting.name: setting for setting in SETTINGS}
    prefixes = tuple({f"{settings.ENVIRONMENT_PREFIX}{setting.section.upper()}_" for setting in SETTINGS})
    given: Given = {}
    for variable, text in sorted(environment.items()):
        setting = names.get(variable) or by_name.get(_SHORT_ENVIRONMENT.get(variable, ""))
        if setting is None:
            if variable.startswith(prefixes):
                meant = settings.closest(variable, names)
                problems.append(
                    Problem(
                        f"environment {variable}",
                        f"unknown variable; {f'did you mean {meant}?' if meant else 'unset it'}",
                    )
                )
        elif text and setting.name in given and given[setting.name][0] != text:
            other = given[setting.name][1]
            problems.append(Problem(setting.name, f"{other} and {variable} say different things; unset one of them"))
        elif text:
            given[setting.name] = (_as_number(setting, text), f"environment {variable}")
    return given


def from_flags(flags: Mapping[str, str], problems: list[Problem]) -> Given:
    """What the flags say, by dotted name of the setting."""
    by_name = {setting.name: setting for setting in SETTINGS}
    given: Given = {}
    for name, text in flags.items():
        if (setting := by_name.get(name)) is None:
            problems.append(Problem(name, f"no setting has this name; known are {', '.join(by_name)}"))
        else:
            given[name] = (_as_number(setting, text), f"flag {setting.flag}")
    return given


def syntax_problem(text: str, message: str) -> Problem:
    """The problem of a text that is not TOML, from the words of tomllib's error."""
    found = re.search(r"\s*\(at line (\d+), column (\d+)\)$", message)
    line = int(found[1]) if found else max(len(text.splitlines()), 1)
    words = message[: found.start()] if found else message.removesuffix(" (at end of document)")
    place_words = f" at column {found[2]}" if found else ""
    return Problem(f"line {line}", f"not TOML: {words}{place_words}; correct the line")


def unknown_names(document: Mapping[str, object]) -> list[Problem]:
    """Sections and keys that no setting has, each with what was probably meant."""
    sections: dict[str, list[str]] = {}
    for setting in SETTINGS:
        sections.setdefault(setting.section, []).append(setting.key)
    known = [*sections, "node"]
    problems = []
    for section, table in document.items():
        if section == "node":
            continue
        if section not in sections:
            problems.append(Problem(section, _unknown_section(section, table, known)))
        elif not isinstance(table, dict):
            problems.append(
                Problem(
                    section,
                    f"expected a table [{section}], found {describe(table)}; write [{section}]",
                )
            )
        else:
            problems.extend(
                Problem(f"{section}.{key}", "unknown key" + key_hint(key, sections[section]))
                for key in table
                if key not in sections[section]
            )
    return problems


def mistyped(document: Mapping[str, object], section: str, key: str = "") -> bool:
    """Whether a missing section or key is there under a name that is close to it, and so reported already."""
    table = document.get(section)
    if table is None:
        known = [*(setting.section for setting in SETTINGS), "node"]
        strange = [name for name, value in document.items() if name not in known and isinstance(value, dict | list)]
        return any(settings.closest(name, known) == section for name in strange)
    if not key:
        return False
    if not isinstance(table, dict):
        return True  # that it is no table is reported already
    here = [setting.key for setting in SETTINGS if setting.section == section]
    return any(settings.closest(name, here) == key for name in table if name not in here)


def key_hint(key: str, here: Sequence[str]) -> str:
    """What an unknown key was meant to be: one of the same section, or one of another."""
    if (meant := settings.closest(key, here)) is not None:
        return f"; did you mean {meant!r}?"
    elsewhere = {setting.key: setting.section for setting in SETTINGS if setting.key not in here}
    if (meant := settings.closest(key, elsewhere)) is not None:
        return f"; did you mean {meant!r} under [{elsewhere[meant]}]?"
    return f"; known here are {', '.join(here)}" if here else "; put keys under a section such as [cluster]"


def _unknown_section(section: str, table: object, known: Sequence[str]) -> str:
    if not isinstance(table, dict | list):
        return "unknown key outside of any section" + key_hint(section, [])
    meant = settings.closest(section, known)
    written = "[[node]]" if meant == "node" else f"[{meant}]"
    return "unknown section" + (f"; did you mean {written}?" if meant else f"; known are {', '.join(known)}")


def _as_number(setting: Setting, text: str) -> object:
    """Text as a whole number where the setting wants one; other text is left for the setting to refuse."""
    return int(text) if setting.numeric and re.fullmatch(r"[+-]?\d{1,18}", text.strip(), re.ASCII) else text
