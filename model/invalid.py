"""Single values that are wrong: what an operator is told of them, and a stack to look for more in.

What has to hold between values (model/checks.py) needs a whole stack. So a value that is wrong is left out, or a
stand-in takes its place, and of what is found then all is told but what may only follow from it.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from model.base import Problem
from model.network import RELEASES
from model.stack import Stack, StackFile

Location: TypeAlias = tuple[int | str, ...]

SENTENCES = {
    "missing": "is missing",
    "tuple_type": "must be a list: write it as [one, another]",
    "dict_type": "must be a map: write its names with their values below it",
    "model_type": "must be a map: write its keys with their values below it",
    "invalid_key": "must be text: put it in quotes",
    "string_type": "must be text: put it in quotes",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length}",
    "too_long": "must have at most {max_length}",
}
"""Kinds of errors of pydantic in words of a stack file."""

UNSAID = "unsaid"
STAND_INS: dict[str, Any] = {
    "service": {
        "domain": f"{UNSAID}.invalid",
        "network_domain": f"net.{UNSAID}.invalid",
        "postmaster": "/dev/null",
        "website": f"https://{UNSAID}.invalid/",
        "preference": [UNSAID],
    },
    "sites": {
        "*": {
            "hypervisor": {"uri": "qemu:///system", "images": {str(number): {"source": UNSAID} for number in RELEASES}},
            "local": {"prefixes": ["192.0.2.0/24"]},
            "public": {"prefixes": ["192.0.2.0/24"]},
        }
    },
    "gateways": {"*": {"name": f"{UNSAID}.invalid", "addresses": ["192.0.2.2"]}},
    "hosts": {
        "*": {
            "site": UNSAID,
            "roles": ["resolver"],
            "addresses": {"local": ["192.0.2.1"]},
            "existing": {"host_key": "ssh-ed25519 AAAA"},
        }
    },
    "domains": {"*": {}},
    "accounts": {"*": {"password": "{BLF-CRYPT}!"}},
    "machine_users": {"*": {"password": UNSAID, "mail_from": f"{UNSAID}.invalid"}},
    "access": {"ssh_from": ["192.0.2.0/24"]},
    "dns": {"servers": {"*": {"address": "192.0.2.3", "key": UNSAID}}},
    "acme": {"directory": f"https://{UNSAID}.invalid/"},
    "dkim": {"selector": UNSAID},
    "filter": {"dnsbl": {"*": {"what": "client", "zone": f"{UNSAID}.invalid"}}},
}
"""For every key that has to be there: a value that says that it was not said. ``*`` stands for any name or number."""

ROUNDS = 4
"""What has lost its last part is left out in the next round."""


@dataclass(frozen=True)
class Reading:
    """What could be read of a configuration. ``stack`` has stand-ins where there are ``problems``; None if too many."""

    stack: Stack | None
    problems: tuple[Problem, ...] = ()
    wrong: tuple[Location, ...] = ()

    def follows(self, problem: Problem) -> bool:
        """Whether a problem of the stack may only be there because of what stands in for a wrong value."""
        return bool(self.wrong) and (UNSAID in str(problem) or any(_follows(problem, place) for place in self.wrong))


def read(values: Mapping[str, Any]) -> Reading:
    """A stack from its configuration, with all that is wrong in single values."""
    doubled = dict(_standing_twice(values, StackFile))
    try:
        return Reading(Stack.model_validate(values), tuple(doubled.values()), tuple(doubled))
    except ValidationError as invalid:
        errors = _errors(invalid)
    problems = tuple(dict.fromkeys((*doubled.values(), *map(_problem, errors))))
    wrong = (*doubled, *(_meant(error) for error in errors))
    left = copy.deepcopy(dict(values))
    for _ in range(ROUNDS):
        # The last first: what is left out of a list moves what stands behind it.
        for error in reversed(errors):
            _leave_out(left, error)
        try:
            return Reading(Stack.model_validate(left), problems, wrong)
        except ValidationError as invalid:
            errors = _errors(invalid)
    return Reading(None, problems, wrong)


def _standing_twice(values: Any, kind: Any, at: Location = ()) -> Iterator[tuple[Location, Problem]]:
    """Keys of maps that are one after they were read, letters, dots and international names alike: the last would win.

    ``kind`` is the type that the values are read as: a model, or what stands behind the colon of a field.
    """
    if hasattr(kind, "model_fields"):
        if isinstance(values, Mapping):
            for name in kind.model_fields.keys() & values.keys():
                yield from _standing_twice(values[name], kind.model_fields[name].annotation, (*at, name))
        return
    inner = get_args(kind)
    if get_origin(kind) is not dict:
        for each in inner:
            yield from _standing_twice(values, each, at)
        return
    seen: dict[str, object] = {}
    for key, value in values.items() if isinstance(values, Mapping) else ():
        with contextlib.suppress(ValidationError):
            read = _reader(inner[0]).validate_python(key)
            if (first := seen.setdefault(read, key)) != key:
                yield (*at, key), Problem(_path((*at, key)), f"stands twice (as {first} too): both are read as {read}")
        yield from _standing_twice(value, inner[1], (*at, key))


@cache
def _reader(kind: Any) -> TypeAdapter[str]:
    """What reads a key of a map."""
    return TypeAdapter(kind)


def _errors(invalid: ValidationError) -> list[Mapping[str, Any]]:
    """The errors but for lists that only lack what is wrong in them. An input may be a secret: none is told."""
    errors = invalid.errors(include_input=False, include_url=False)
    places = {error["loc"][:length] for error in errors for length in range(len(error["loc"]))}
    return [error for error in errors if error["type"] != "too_short" or error["loc"] not in places]


def _problem(error: Mapping[str, Any]) -> Problem:
    location, kind = tuple(error["loc"]), error["type"]
    if kind == "extra_forbidden":
        near, known = _nearest(location), ", ".join(_known_keys(location))
        return Problem(_path(location), "unknown key, " + (f"did you mean {near}?" if near else f"known are {known}"))
    if kind in SENTENCES:
        return Problem(_path(location), SENTENCES[kind].format(**error.get("ctx", {})).replace("'", ""))
    message = str(error["msg"])
    own = message.removeprefix("Value error, ")
    return Problem(_path(location), own if own != message else message[:1].lower() + message[1:])


def _path(location: Location) -> str:
    path = ""
    for part in location:
        if part == "[key]":
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _nearest(location: Location) -> str | None:
    return next(iter(difflib.get_close_matches(str(location[-1]), _known_keys(location), n=1)), None)


def _known_keys(location: Location) -> list[str]:
    """The field names beside an unknown key, by walking the model along its path."""
    model: Any = StackFile
    for part in location[:-1]:
        if field := getattr(model, "model_fields", {}).get(part):
            model = _model_in(field.annotation)
    return list(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if hasattr(annotation, "model_fields"):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _model_in(argument):
            return found
    return None


def _meant(error: Mapping[str, Any]) -> Location:
    """The place that is wrong: for an unknown key, the one that it may have been meant for."""
    location = tuple(part for part in error["loc"] if part != "[key]")
    near = _nearest(location) if error["type"] == "extra_forbidden" else None
    return (*location[:-1], near) if near else location


def _leave_out(values: dict[str, Any], error: Mapping[str, Any]) -> None:
    """Takes a wrong value out of a configuration, and puts a stand-in where there has to be one."""
    holder: Any = values
    stand_in: Any = STAND_INS
    location = [part for part in error["loc"] if part != "[key]"]
    for part in location[:-1]:
        inner = holder[part] if _has(holder, part) else None
        if not isinstance(inner, dict | list):
            # One value in place of a list of one.
            location = [part]
            break
        holder, stand_in = inner, _below(stand_in, part)
    part = location[-1]
    stand_in = _below(stand_in, part) if error["type"] in ("missing", "too_short") else None
    if stand_in is not None and isinstance(holder, dict):
        holder[part] = _named(stand_in)
    elif _has(holder, part):
        del holder[part]
    elif len(location) > 1:
        _leave_out(values, {"type": "", "loc": location[:-1]})


def _has(holder: Any, part: int | str) -> bool:
    return part in holder if isinstance(holder, dict) else isinstance(part, int) and part < len(holder)


def _below(stand_in: Any, part: int | str) -> Any:
    return stand_in.get(str(part), stand_in.get("*")) if isinstance(stand_in, dict) else None


def _named(stand_in: Any) -> Any:
    if not isinstance(stand_in, dict):
        return copy.copy(stand_in)
    return {UNSAID if name == "*" else name: _named(inner) for name, inner in stand_in.items()}


def _follows(problem: Problem, wrong: Location) -> bool:
    """It does where it is told of the same place, or where it names the section, or the one in it, that is wrong.

    Where all that has names in a section is wrong, nothing is sure.
    """
    path, section = _path(wrong), str(wrong[0])
    named = "*" in STAND_INS.get(section, {})
    if (named and len(wrong) == 1) or f"{section}." in problem.message:
        return True
    if _within(problem.path, path) or _within(path, problem.path):
        return True
    if not named or not isinstance(wrong[1], str):
        return False
    # What is lost as a whole is missed at other places; else the message says whose value it was.
    text = str(problem) if len(wrong) == 2 else problem.message
    return bool(re.search(rf"(?<![\w-]){re.escape(wrong[1])}(?![\w-])", text, re.IGNORECASE))


def _within(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith((f"{outer}.", f"{outer}["))


def told(reading: Reading, found: Iterable[Problem]) -> list[Problem]:
    """All problems of a reading: of single values, and of those between them that are there for sure."""
    return sorted({*reading.problems, *(problem for problem in found if not reading.follows(problem))})
