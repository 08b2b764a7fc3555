"""Every configuration key of a stack file, as a page: made from the model, so that it says what is read."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from model.base import Frozen
from model.keys import Keys
from model.mail import Target
from model.stack import StackFile
from ops.stackfile import write_atomically

HEAD = """# Every key of a stack file

Made from the model by `make reference`. In a stack file each key of the first level stands under `config:`, with
`posthorn:` before it. A key without a default has to be there. `<name>` stands for a name that you choose.
"""

WORDS: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    SecretStr: "secret",
    Target: "account, address or `/dev/null`",
    "IPvAnyAddress": "IP address",
    "IPvAnyNetwork": "network",
    "_dns_name": "DNS name",
    "_host_name": "DNS name",
    "_label": "label",
    "_selector": "label",
    "_local_part": "local part",
    "_alias_key": "local part or `*`",
    "_address": "mail address",
    "_own_address": "mail address",
    "_sender": "mail address or domain",
    "_number": "",
}
"""What a value is called, by its type or by the function that reads it."""


BOUNDS = (("ge", "at least"), ("le", "at most"))
PATH = Path(__file__).parent.parent / "docs" / "reference.md"


def page() -> str:
    """The page, in Markdown. Raises `ValueError` for a key that says nothing of itself."""
    return "\n".join((HEAD, *_section("", StackFile)))


def _section(path: str, model: type[BaseModel]) -> Iterator[str]:
    fields = {name: field for name, field in model.model_fields.items() if _inner(field.annotation) is not Keys}
    if path:
        yield f"## `{path}`\n"
        yield _prose(inspect.getdoc(model) or "") + "\n"
        told = _told(model)
        yield "| key | value | default | |"
        yield "|---|---|---|---|"
        for name, field in fields.items():
            if name not in told:
                raise ValueError(f"{model.__name__}.{name} has no docstring: say what it is for")
            yield f"| `{name}` | {_value(field)} | {_default(field)} | {_prose(told[name])} |"
        yield ""
    for name, field in fields.items():
        inner = _inner(field.annotation)
        if inner is not None:
            yield from _section(f"{path}.{name}".lstrip(".") + _index(field.annotation), inner)


def _told(model: type[BaseModel]) -> dict[str, str]:
    """Field to the text that stands below it in the source, those that the model inherits included."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if cls in (Frozen, BaseModel) or not issubclass(cls, Frozen):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[statement.target.id] = inspect.cleandoc(str(after.value.value))
    return found


def _prose(text: str) -> str:
    """Text of a docstring on one line per paragraph, its code in Markdown's notation."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).replace("``", "`").replace("|", "\\|")


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The model that a value, a list or a map holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _inner(argument)) is not None:
            return found
    return None


def _index(annotation: Any) -> str:
    origin = get_origin(annotation)
    return ".<name>" if origin is dict else "[]" if origin is tuple else ""


def _value(field: FieldInfo) -> str:
    return _words(field.annotation, [*field.metadata])


def _words(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    for item in metadata:
        word = WORDS.get(getattr(getattr(item, "func", None), "__name__", ""))
        if word:
            return word
    if origin is Annotated:
        return _words(arguments[0], list(arguments[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(a, []) for a in arguments if a is not type(None))
    if origin is Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        return f"list of: {_words(arguments[0], [])}"
    if origin is dict:
        return f"map of {_words(arguments[0], [])} to {_words(arguments[1], [])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "see below"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    bounds = [f"{sign} {getattr(item, name)}" for item in metadata for name, sign in BOUNDS if hasattr(item, name)]
    word = WORDS.get(annotation) or WORDS[getattr(annotation, "__name__", str(annotation))]
    return " ".join((word, *(["(" + ", ".join(bounds) + ")"] if bounds else [])))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    default = field.get_default()
    if default is None or default == () or default == {} or default == "" or isinstance(default, BaseModel):
        return "none" if not isinstance(default, BaseModel) else "as below"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    write_atomically(PATH, page())
