"""Text → plain values: YAML whose traps are named instead of sprung, and the sentences of every refusal.

The resolver is hybridsim's own: `1e-3` is a number, a bare `no` is refused by name, a key may stand once. Tags are not offered,
and depth, size and the number of values (aliases counted out) are bounded, so no text can run code or fill the memory.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml


class ConfigError(Exception):
    """One sentence: where, what was found, what is possible, the nearest match, what to do."""


# --- sentences -----------------------------------------------------------------------------------------------------------------

KeyPath = tuple[str | int, ...]


def key_path(parts: Iterable[str | int]) -> str:
    """`("runs", "bare", "corrections", 0, "cs")` as `runs.bare.corrections[0].cs`."""
    out = ""
    for part in parts:
        name = part if isinstance(part, int) or len(part) <= 60 else part[:57] + "..."
        out += f"[{name}]" if isinstance(name, int) else f".{name}" if out else name
    return out


def show_value(value: Any) -> str:
    """A value as YAML would write it, in at most 60 characters."""
    if isinstance(value, str):
        text = repr(value)
    elif value is None:
        text = "null"
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{k}: {show_value(v)}" for k, v in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show_value(v) for v in value) + "]"
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, possible: Iterable[str]) -> str | None:
    """The possible name that is closest to `name`, if any is close."""
    possible = list(possible)
    folded = {p.lower().replace("-", "_"): p for p in reversed(possible)}
    wanted = str(name).lower().replace("-", "_").replace(" ", "_")
    found = difflib.get_close_matches(wanted, folded, 1, 0.6)
    return folded[found[0]] if found else None


def one_of(possible: Iterable[str]) -> str:
    possible = sorted(possible)
    if not possible:
        return "nothing"
    return possible[0] if len(possible) == 1 else ", ".join(possible[:-1]) + " and " + possible[-1]


def suggestion(name: str, possible: Iterable[str], what: str = "possible") -> str:
    """`did you mean 'x'?`, or the whole list where nothing is close."""
    possible = list(possible)
    match = nearest(name, possible)
    return f"did you mean {match!r}?" if match else f"{what}: {one_of(possible)}"


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# --- YAML ----------------------------------------------------------------------------------------------------------------------

MOST_BYTES = 2**20
MOST_VALUES = 20_000
DEEPEST = 24

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)\Z")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")
WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_TRAPS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?i:y|yes|on)\Z"), "which YAML reads as the boolean true; write true, or put the word in quotes"),
    (re.compile(r"(?i:n|no|off)\Z"), "which YAML reads as the boolean false; write false, or put the word in quotes"),
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9]*)?\Z"), "which YAML reads in base 60; write a decimal number"),
    (re.compile(r"[-+]?0[0-9_]+\Z"), "which YAML reads in base 8; write it without the leading zero"),
    (re.compile(r"[-+]?0(x[0-9a-fA-F_]+|b[01_]+|o[0-7_]+)\Z"), "which is no decimal number; write it as one"),
    (re.compile(r"(?i:[-+]?\.inf|\.nan)\Z"), "which is not finite; write a finite number"),
    (re.compile(r"<<\Z"), "a merge key, which is not offered; write the keys out"),
)


def _scalar(text: str, path: KeyPath) -> Any:
    """A plain scalar as its author meant it: `1e-3` is a number, a bare `no` is refused by name."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in WORDS:
        return WORDS[text]
    for pattern, sentence in _TRAPS:
        if pattern.match(text):
            raise ConfigError(f"{key_path(path)}: found {text[:60]}, {sentence}")
    if _INTEGER.match(text):
        if len(text) > 20:
            raise ConfigError(f"{key_path(path)}: found a whole number of {len(text)} digits; write one below 2^63")
        return int(text.replace("_", ""))
    if NUMBER.match(text):
        value = float(text)
        if not math.isfinite(value):
            raise ConfigError(f"{key_path(path)}: found {text[:60]}, which is too large for a double; write a finite number")
        return value
    return text


class _Reader:
    """Plain values from the events of one YAML document, with bounds on depth and on the number of values."""

    def __init__(self, text: str, source: str, at: KeyPath = ()):
        self.source = source
        self.at = at
        self.lines: dict[KeyPath, int] = {}
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.count = 0
        self.anchors: dict[str, tuple[Any, int]] = {}

    def refuse(self, mark: Any, sentence: str) -> ConfigError:
        where = f"{self.source} line {mark.line + 1}" if mark is not None else self.source
        return ConfigError(f"{where}: {sentence}")

    def next(self) -> Any:
        return next(self.events)

    def spend(self, values: int, mark: Any) -> None:
        self.count += values
        if self.count > MOST_VALUES:
            raise self.refuse(mark, f"found more than {MOST_VALUES} values (aliases counted out); an experiment has far fewer")

    def document(self) -> Any:
        self.next()
        event = self.next()
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self.value(self.next(), self.at)
        self.next()
        event = self.next()
        if not isinstance(event, yaml.StreamEndEvent):
            raise self.refuse(event.start_mark, "found a second document; one file is one experiment")
        return value

    def value(self, event: Any, path: KeyPath) -> Any:
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.refuse(mark, f"the alias *{event.anchor} stands before or inside what it names")
            value, size = self.anchors[event.anchor]
            self.spend(size, mark)
            return json.loads(json.dumps(value))
        before, anchor = self.count, event.anchor
        self.spend(1, mark)
        if len(path) > DEEPEST + len(self.at):
            raise self.refuse(mark, f"found values nested more than {DEEPEST} deep; an experiment is flat")
        if event.tag is not None and event.tag != "!":
            at = f"{key_path(path)}: " if path else ""
            raise self.refuse(mark, f"{at}found the tag {event.tag[:60]}, and tags are not offered; remove it")
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event.value, path) if event.style is None and event.tag is None else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(event := self.next(), yaml.SequenceEndEvent):
                value.append(self.value(event, (*path, len(value))))
        else:
            value = self.mapping(path)
        if anchor is not None:
            self.anchors[anchor] = (value, self.count - before)
        return value

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        value: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            mark = event.start_mark
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise self.refuse(mark, f"{key_path(path) or 'the top'}: found a key that is not a word; keys are words")
            here = (*path, event.value)
            key = _scalar(event.value, here) if event.style is None else event.value
            if not isinstance(key, str):
                raise self.refuse(mark, f"{key_path(here)}: found the key {event.value}, which is not a word; put it in quotes")
            if key in value:
                raise self.refuse(mark, f"{key_path(here)}: found twice (first in line {lines[key]}); remove one")
            lines[key] = self.lines[here] = mark.line + 1
            value[key] = self.value(self.next(), here)
        return value


def parse_yaml(text: str, source: str = "YAML", at: KeyPath = (), lines: dict[KeyPath, int] | None = None) -> Any:
    """The plain values of one YAML document, or a `ConfigError` that names line and key path.

    **Arguments:** the `text`; `source`, how messages call it; `at`, the key path under which it stands; `lines`, filled with the
    line of every key where given.

    >>> parse_yaml("viscosity: 1e-3")
    {'viscosity': 0.001}
    >>> parse_yaml("may_diverge: no")
    Traceback (most recent call last):
    hybridsim.yaml_reader.ConfigError: may_diverge: found no, which YAML reads as the boolean false; ...
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source}: longer than {MOST_BYTES // 2**20} MiB; an experiment is a page of text")
    reader = _Reader(text, source, at)
    reader.lines = {} if lines is None else lines
    try:
        return reader.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        sentence = " ".join(str(error.problem or error.context or "not YAML").split())[:200]
        hint = "; indent with spaces" if "\\t" in sentence else ""
        column = f", column {mark.column + 1}" if mark is not None else ""
        where = f"{source} line {mark.line + 1}{column}" if mark is not None else source
        raise ConfigError(f"{where}: this is not valid YAML: {sentence}{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: this is not valid YAML: {' '.join(str(error).split())[:200]}") from None
