"""All files of all hosts and zones of a stack, written below a folder for eyes and for diff."""

from __future__ import annotations

import shutil
from pathlib import Path

from model.checks import missing_keys
from model.stack import Stack
from services.bundle import bundle
from services.zones import zone_files

MARKER = ".rendered-by-posthorn"


def left_out(stack: Stack) -> str:
    """A sentence on the records that a rendering lacks while their keys are not made; empty where all are there."""
    missing = [problem.path for problem in missing_keys(stack)]
    kinds = {"DKIM": "keys.public.dkim.", "TLSA": "keys.public.hosts."}
    lacking = [kind for kind, prefix in kinds.items() if any(path.startswith(prefix) for path in missing)]
    if not lacking:
        return ""
    return (
        f"{stack.name}: {' and '.join(lacking)} records are left out of the zones, as their keys are missing:"
        f" run make keys STACK={stack.name}"
    )


def render_stack(stack: Stack, out: Path) -> int:
    """Writes hosts/<host>/<path> and zones/<zone>.zone below ``out``, and returns how many files.

    Needs no Pulumi, network or passphrase; secrets are marked placeholders. What an earlier rendering wrote is
    removed first; a folder that holds anything else is left alone.

    Raises `FileExistsError` when ``out`` holds something that no rendering wrote.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise FileExistsError(f"{out} holds other things than a rendering: name an empty folder")
    for old in ("hosts", "zones"):
        shutil.rmtree(out / old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    texts: dict[Path, str] = {}
    for host in stack.all_hosts.values():
        contents = bundle(stack, host)
        folder = out / "hosts" / host.name
        for path, file in contents["files"].items():
            texts[folder / path.lstrip("/")] = file["content"]
        for path, secret in contents["secrets"].items():
            texts[folder / path.lstrip("/")] = f"SECRET {secret['name']}\n"
    for zone, text in zone_files(stack).items():
        texts[out / "zones" / f"{zone}.zone"] = text
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return len(texts)
