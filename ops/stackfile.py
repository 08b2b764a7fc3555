"""Changing a stack file in place: comments and order stay as the operator has them."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from model.load import PROJECT

KEYS = f"{PROJECT}:keys"


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    return yaml


def _literal(value: Any) -> Any:
    """Texts of several lines as YAML blocks, so that a certificate can be read and compared."""
    if isinstance(value, Mapping):
        return {key: _literal(inner) for key, inner in value.items()}
    return LiteralScalarString(value) if isinstance(value, str) and "\n" in value else value


def write_atomically(path: Path, text: str, mode: int | None = None) -> None:
    """Replaces a file in one step, so that a reader sees the old or the new text, never a part.

    Without a ``mode`` it has the one of the file before; a link stays, and what it leads to is replaced.
    """
    path = path.resolve()
    if mode is None:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def replaced_at_once(path: Path) -> Iterator[Path]:
    """A copy of a file to work on, which takes its place in one step when all is done, and never if that fails."""
    path = path.resolve()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        copy = Path(shutil.copy2(path, folder))
        yield copy
        os.replace(copy, path)


def has_private_keys(path: Path) -> bool:
    """Whether the stack file holds private keys already."""
    document = _yaml().load(path.read_text())
    return "private" in (document["config"].get(KEYS) or {})


def set_public_keys(path: Path, public: Mapping[str, Any]) -> None:
    """Writes the public halves of the keys into the stack file."""
    yaml = _yaml()
    document = yaml.load(path.read_text())
    document["config"].setdefault(KEYS, {})["public"] = _literal(public)
    text = io.StringIO()
    yaml.dump(document, text)
    write_atomically(path, text.getvalue())
