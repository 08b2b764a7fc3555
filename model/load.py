"""From a stack file to a `Stack`, or to all that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from model import invalid
from model.base import Problem, StackError
from model.checks import all_problems
from model.keys import PLACEHOLDER
from model.stack import Stack

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


READ_OTHERWISE = (
    "tag:posthorn,2026:read-otherwise",
    re.compile(
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?0o[0-7_]+|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?)$"
    ),
    list("+-.0123456789"),
)
"""An implicit resolver of PyYAML: a tag for what Pulumi's reader (YAML 1.2, Go's yaml.v3) takes for a number or a date.
Much of it is text in YAML 1.1: ``0190`` and ``1e5`` would be 190 and 100000 there, and addresses here."""


def _refuse(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    problem = f"{node.value} is not read as text by Pulumi: put it in quotes"
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


# Those of YAML 1.1 are asked before: what both take for a number is one.
_UniqueKeys.add_implicit_resolver(*READ_OTHERWISE)
_UniqueKeys.add_constructor(READ_OTHERWISE[0], _refuse)


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


def parse(name: str, source: str, config: Mapping[str, Any], *more: Callable[[Stack], Iterable[Problem]]) -> Stack:
    """A stack from its configuration keys. ``more`` looks at it beside the checks of the model.

    Raises `StackError` with every problem: of single values, between them, and what ``more`` found.
    """
    reading = invalid.read({**_ordered(config), "name": name})
    stack = reading.stack
    found = [problem for check in (all_problems, *more) for problem in check(stack)] if stack else []
    problems = invalid.told(reading, found)
    if problems or stack is None:
        raise StackError(source, problems)
    return stack


def load(path: Path, name: str | None = None, *more: Callable[[Stack], Iterable[Problem]]) -> Stack:
    """Reads a stack file without Pulumi, network or passphrase; every secret is a placeholder.

    ``name`` is the stack's; by default it is taken from the file's name, ``Pulumi.<name>.yaml``.
    """
    stack_name = name or path.name.removeprefix("Pulumi.").removesuffix(".yaml")
    return parse(stack_name, str(path), read_file(path), *more)
