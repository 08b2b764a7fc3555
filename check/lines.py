"""Finds what a host's journal has of some mails, and prints it as JSON. Changes nothing, concludes nothing.

With Python's standard library alone: it is sent over the one SSH connection of ``make trace``, as `check.look` is by
``make check``. What it reads of a line is read by `check.trace` the same way.

A piece is all that is logged of a mail under one queue ID of Postfix or OpenSMTPD, or a line that stands for itself:
a refusal at RCPT, a scanner's verdict, a delivery by Dovecot.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

Entry = tuple[float, str, str]
"""Time, who logged it, and the text."""
Piece = list[Entry]
Task = dict[str, Any]

COMMAND_SECONDS = 240
UNITS = ("postfix.service", "postfix@-.service", "dovecot.service", "rspamd.service", "opendkim.service")
OPENSMTPD = "opensmtpd.service"
BY_HAND = "postfix/postsuper"
"""It runs in nobody's unit."""

QUEUED = re.compile(r"(?:warning: )?([0-9A-F]{6,}|[0-9B-DF-HJ-NP-TV-Zb-df-hj-np-tv-z]{10,20}): ")
"""What Postfix begins a line with: a short queue ID, or a long one (enable_long_queue_ids in postconf(5))."""
ENVELOPE = re.compile(r"[0-9a-f]{16} (?:smtp message msgid|smtp envelope evpid|mta delivery evpid)=([0-9a-f]{8})")
"""OpenSMTPD's message, whose envelopes begin as it does."""
ADDRESSES = re.compile(r"\b(?:from|to|orig_to|rcpts?)[=:] ?<([^<>\s]+@[^<>\s]+)>")
MESSAGE_ID = re.compile(r"\b(?:message-id=|msgid=|write_log: id: )<?([^<>\s,]+@[^<>\s,]+)>?")
LATER = re.compile(r"(?:queued as |notification: |qid: <)([0-9A-Za-z]{6,20})\b")
"""Where a mail has another queue ID: on the next host, as a bounce, and in a scanner's words on the host that asked."""
SESSION = re.compile(r"lmtp\([^)]*\)<\d+><([^>]+)>|> (\S+) Saved\)$")
"""Dovecot's LMTP session, which stands in its reply to Postfix, too."""
BEGINS, ENDS = re.compile(r"^\w+: (?:client=|uid=)"), re.compile(r"^\w+: removed$")
ALONE = re.compile(r"NOQUEUE: |.*\brspamd_task_write_log: |lmtp\(.*\bmsgid=", re.DOTALL)


def addresses(text: str) -> set[str]:
    return {address.lower() for group in ADDRESSES.findall(text) for address in group.split(",")}


def message_ids(text: str) -> set[str]:
    """Message-IDs, in brackets (RFC 5322 section 3.6.4)."""
    return {f"<{found.lower()}>" for found in MESSAGE_ID.findall(text)}


def later(text: str) -> set[str]:
    return set(LATER.findall(text))


def sessions(text: str) -> set[str]:
    return {one or other for one, other in SESSION.findall(text)}


def own_id(text: str) -> str:
    """The queue ID that a line is about; empty when it is about none."""
    found = QUEUED.match(text) or ENVELOPE.match(text)
    return found.group(1) if found else ""


def pieces(entries: Iterable[Entry]) -> Iterator[Piece]:
    """Lines of a journal, in their order, gathered by mail. Short queue IDs come again: each begins anew."""
    under_way: dict[str, Piece] = {}
    for entry in entries:
        text = entry[2]
        if name := own_id(text):
            if BEGINS.search(text) and name in under_way:
                yield under_way.pop(name)
            under_way.setdefault(name, []).append(entry)
            if ENDS.search(text):
                yield under_way.pop(name)
        elif ALONE.match(text):
            yield [entry]
    yield from under_way.values()


def links(piece: Piece) -> set[str]:
    """By what other pieces of the same mail are found."""
    found = set()
    for _, _, text in piece:
        found |= message_ids(text) | later(text) | sessions(text) | {own_id(text)}
    return found - {""}


def names(piece: Piece) -> set[str]:
    """By what a piece is found: its links, and the addresses of its envelope."""
    return links(piece).union(*(addresses(text) for _, _, text in piece))


def chosen(all_pieces: Iterable[Piece], wanted: set[str]) -> list[Piece]:
    """The pieces that are wanted, and those that these lead to."""
    left, found = [(piece, names(piece)) for piece in all_pieces], []
    while taken := [piece for piece, known in left if known & wanted]:
        found += taken
        left = [(piece, known) for piece, known in left if not known & wanted]
        wanted = wanted.union(*(links(piece) for piece in taken))
    return found


def journal(since: float) -> Iterator[Entry]:
    """What the daemons of mail logged (journalctl(1)). Raises `OSError` or `subprocess.SubprocessError`."""
    units = [f"_SYSTEMD_UNIT={unit}" for unit in (*UNITS, OPENSMTPD)]
    fields = "--output-fields=SYSLOG_IDENTIFIER,MESSAGE"
    command = ["journalctl", "--quiet", f"--since=@{since:.0f}", "--output=json", fields, *units]
    done = subprocess.run([*command, "+", f"SYSLOG_IDENTIFIER={BY_HAND}"], capture_output=True, timeout=COMMAND_SECONDS)
    if done.returncode not in (0, 1):
        raise OSError(done.stderr.decode(errors="replace").strip()[-300:])
    for line in done.stdout.splitlines():
        entry = json.loads(line)
        message = entry.get("MESSAGE") or ""
        # What is not text comes as numbers (systemd.journal-fields(7)).
        text = message if isinstance(message, str) else bytes(message).decode(errors="replace")
        yield int(entry["__REALTIME_TIMESTAMP"]) / 1e6, str(entry.get("SYSLOG_IDENTIFIER", "?")), text


def main(task: Task) -> None:
    """Prints the pieces."""
    found = chosen(pieces(journal(task["since"])), set(task["wanted"]))
    json.dump({"time": time.time(), "pieces": found}, sys.stdout)
