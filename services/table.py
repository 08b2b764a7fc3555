"""Look-up tables in plain text, as Postfix and rspamd read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def table(entries: Mapping[str, str] | Iterable[tuple[str, str]]) -> str:
    """One entry a line (texthash of DATABASE_README), in order, so that a preview shows what changed."""
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    return "".join(f"{key} {value}\n" for key, value in sorted(pairs))


def entries(values: Iterable[object]) -> str:
    """A set as rspamd reads it, one entry a line. In quotes: else # begins a comment, and / a pattern."""
    return "".join(f'"{value}"\n' for value in values)
