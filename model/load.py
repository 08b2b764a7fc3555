"""From a stack file to a `Stack`, or to all that is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from model.base import Problem, StackError
from model.checks import all_problems
from model.keys import PLACEHOLDER
from model.stack import Stack, StackFile

PROJECT = "posthorn"


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the second would silently win.

    A key that is no text is one too: YAML reads ``no:`` as false. Whole numbers may pass, as releases are.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = None
            if isinstance(key, bool) or not isinstance(key, str | int):
                written = f"the key {key_node.value}" if isinstance(key_node, yaml.ScalarNode) else "a key"
                problem = f"{written} is not read as text: put it in quotes"
            elif key in seen:
                problem = f"the key {key} stands twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _without_secrets(value: Any) -> Any:
    """The same value with every ``secure:`` value replaced by a marked placeholder."""
    if isinstance(value, dict):
        if set(value) == {"secure"}:
            return PLACEHOLDER
        return {key: _without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner) for inner in value]
    return value


def read_file(path: Path) -> dict[str, Any]:
    """The project's configuration in a stack file, secrets as placeholders.

    Raises `StackError` where the file cannot be read or is not YAML.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.load(text, _UniqueKeys)
    except FileNotFoundError:
        raise StackError(str(path), [Problem("file", "there is no such file")]) from None
    except OSError as error:
        raise StackError(str(path), [Problem("file", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise StackError(str(path), [Problem(f"line {line}", "is not UTF-8: save the file as UTF-8")]) from None
    except yaml.reader.ReaderError as error:
        line, told = text.count("\n", 0, error.position) + 1, f"holds a character that YAML refuses: {error.reason}"
        raise StackError(str(path), [Problem(f"line {line}", told)]) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise StackError(str(path), [Problem(f"line {line}", error.problem or "not YAML")]) from None
    config = document.get("config") if isinstance(document, dict) else None
    if not isinstance(config, dict):
        raise StackError(str(path), [Problem("config", "the file has no config section")])
    prefix = f"{PROJECT}:"
    keys = (key for key in config if isinstance(key, str) and key.startswith(prefix))
    return {key.removeprefix(prefix): _without_secrets(config[key]) for key in keys}


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if part == "[key]":
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
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


def _problem(error: Mapping[str, Any]) -> Problem:
    location = tuple(error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _known_keys(location), n=1)
        return Problem(_path(location), "unknown key" + (f", did you mean {near[0]}?" if near else ""))
    if error["type"] == "missing":
        return Problem(_path(location), "is missing")
    message = str(error["msg"]).removeprefix("Value error, ")
    return Problem(_path(location), message[:1].lower() + message[1:])


def _ordered(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in the one order that counts.

    Pulumi hands keys over sorted, a file has them as they were written: what is first may not depend on that. Sites
    come by preference, hosts by their site's, all else by name.
    """
    ordered: dict[str, Any] = _sorted(config)
    service = config.get("service")
    preference = service.get("preference") if isinstance(service, dict) else None
    sites = preference if isinstance(preference, list) else []

    def place(site: object) -> int:
        return sites.index(site) if site in sites else len(sites)

    if isinstance(named := ordered.get("sites"), dict):
        ordered["sites"] = dict(sorted(named.items(), key=lambda item: (place(item[0]), str(item[0]))))
    if isinstance(hosts := ordered.get("hosts"), dict):

        def of_host(item: tuple[str, Any]) -> tuple[int, str]:
            return place(item[1].get("site") if isinstance(item[1], dict) else None), str(item[0])

        ordered["hosts"] = dict(sorted(hosts.items(), key=of_host))
    return ordered


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value, key=str)}
    return [_sorted(inner) for inner in value] if isinstance(value, list) else value


def parse(name: str, source: str, config: Mapping[str, Any]) -> Stack:
    """A stack from its configuration keys.

    Raises `StackError` with every problem: first those of single values, and when there are none, those between them.
    """
    try:
        stack = Stack.model_validate({"name": name, **_ordered(config)})
    except ValidationError as invalid:
        # include_input=False: an input may be a secret.
        raise StackError(
            source, [_problem(e) for e in invalid.errors(include_input=False, include_url=False)]
        ) from None
    if problems := all_problems(stack):
        raise StackError(source, problems)
    return stack


def load(path: Path, name: str | None = None) -> Stack:
    """Reads a stack file without Pulumi, network or passphrase; every secret is a placeholder.

    ``name`` is the stack's; by default it is taken from the file's name, ``Pulumi.<name>.yaml``.
    """
    stack_name = name or path.name.removeprefix("Pulumi.").removesuffix(".yaml")
    return parse(stack_name, str(path), read_file(path))
