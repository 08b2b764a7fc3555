"""Templates: a tree per service, laid out like the file system of the host that its files end on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from services.service import File

TEMPLATES = Path(__file__).parent.parent / "templates"

_environment = Environment(
    loader=FileSystemLoader(TEMPLATES),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # These are configuration files, not HTML.
)


def render(template: str, **values: Any) -> str:
    """The text of one template (a path below templates/). A name that is not given is an error."""
    return _environment.get_template(template).render(**values)


def render_tree(
    tree: str, *, release: int | None = None, modes: dict[str, str] | None = None, **values: Any
) -> tuple[File, ...]:
    """Every file below templates/<tree>, at the same path on the host.

    Files that end in ``.j2`` are rendered and lose the ending, others go as they are. ``modes`` maps a path on the
    host to a mode other than 0644. With a ``release`` of Debian the templates know it, and what that release alone has
    comes along: it is below templates/<tree>-<release>.
    """
    modes, files = modes or {}, []
    trees = [tree]
    if release is not None:
        values["release"] = release
        trees.append(f"{tree}-{release}")
    for root in (TEMPLATES / name for name in trees):
        for source in sorted(path for path in root.rglob("*") if path.is_file()):
            target = "/" + source.relative_to(root).as_posix().removesuffix(".j2")
            rendered = source.suffix == ".j2"
            text = render(source.relative_to(TEMPLATES).as_posix(), **values) if rendered else source.read_text()
            files.append(File(target, text, mode=modes.get(target, "0644")))
    return tuple(files)
