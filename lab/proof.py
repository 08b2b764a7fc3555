"""The proof that the service works: one mail in, one mail out, each looked at hop by hop."""

from __future__ import annotations

import email
import email.policy
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from lab import foreign
from lab.state import State

ARRIVES_SECONDS = 90
Run = Callable[..., Any]


class ProofFailed(Exception):
    """Something that the proof has to show did not happen."""


@dataclass(frozen=True)
class Hop:
    """One station on the way of a mail."""

    where: str
    what: str
    time: float


def hops(mail: EmailMessage) -> list[Hop]:
    """The way of a mail by its Received headers, first hop first (RFC 5321 section 4.4)."""
    found = []
    for header in reversed(mail.get_all("Received", [])):
        text = " ".join(str(header).split())
        way, _, date = text.rpartition(";")
        by = re.search(r"\bby (\S+)", way)
        # "with" stands before a cipher too: the protocol is the one after the host.
        protocol = re.search(r"\bby .*?\bwith (\S+)", way)
        source = re.search(r"\bfrom (\S+)", way)
        what = f"{protocol.group(1) if protocol else 'local'}{' from ' + source.group(1) if source else ''}"
        found.append(Hop(by.group(1) if by else "?", what, parsedate_to_datetime(date.strip()).timestamp()))
    return found


def _results(mail: EmailMessage, needed: Mapping[str, str]) -> str:
    """The Authentication-Results of a mail (RFC 8601). Raises `ProofFailed` where one is not as needed."""
    text = " ".join(" ".join(str(header).split()) for header in mail.get_all("Authentication-Results", []))
    for method, result in needed.items():
        if f"{method}={result}" not in text:
            raise ProofFailed(f"the receiver does not say {method}={result}, it says: {text or 'nothing'}")
    return text


def _table(title: str, start: float, way: list[Hop]) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("s", justify="right")
    table.add_column("where")
    table.add_column("what", overflow="fold")
    for hop in way:
        table.add_row(f"{max(0.0, hop.time - start):.2f}", hop.where, hop.what)
    return table


def _parse(text: str) -> EmailMessage:
    return email.message_from_string(text, policy=email.policy.default)


def _client(state: State, request: Mapping[str, Any]) -> dict[str, Any]:
    done = state.run_in(
        "client",
        [state.python, "-m", "lab.client"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ProofFailed((done.stderr or done.stdout).strip())
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def prove(state: State, console: Console) -> None:
    """Sends a mail from abroad to a user, reads it, answers it, and finds the answer abroad.

    Prints the way of both, hop by hop. Raises `ProofFailed` with what is missing.
    """
    common = {"authority": str(state.world_file), "user": "ann", "password": state.passwords["ann"]}
    tag = secrets.token_hex(4)

    start = time.time()
    message_id = foreign.send(state, sender="bob@far.example", to="ann@hill.example", subject=f"Hello {tag}")
    fetch = {"action": "fetch", "server": "imap.hill.example", "message_id": message_id, "seconds": ARRIVES_SECONDS}
    read = _client(state, common | fetch)
    mail = _parse(read["mail"])
    way = [
        Hop("mx.far.example", "bob@far.example writes to ann@hill.example", start),
        *hops(mail),
        Hop("client", f"read over IMAPS through front end {read['peer']}", read["time"]),
    ]
    console.print(_table("In: from a foreign host to a user", start, way))
    console.print(f"      {_results(mail, {'spf': 'pass', 'dkim': 'pass', 'dmarc': 'pass'})}", soft_wrap=True)
    if read["copies"] != 1:
        raise ProofFailed(f"the mail is {read['copies']} times in the mailbox")

    start = time.time()
    answer = {
        "action": "submit",
        "server": "smtp-out.hill.example",
        "from": "ann@hill.example",
        "to": "bob@far.example",
        "subject": f"Re: Hello {tag}",
        "text": f"Thank you for {tag}.\n",
        "original": message_id,
    }
    sent = _client(state, common | answer)
    arrived = foreign.wait_for(state, sent["message_id"], ARRIVES_SECONDS)
    if arrived is None:
        raise ProofFailed(f"the answer {sent['message_id']} did not arrive at mx.far.example")
    mail = _parse(arrived)
    way = [
        Hop("client", f"submitted on 587 with STARTTLS through front end {sent['peer']}", sent["time"]),
        *hops(mail),
        Hop("mx.far.example", "in the mailbox of bob@far.example", time.time()),
    ]
    console.print(_table("Out: the user's answer to the foreign host", start, way))
    console.print(f"      {_results(mail, {'spf': 'pass', 'dkim': 'pass', 'dmarc': 'pass'})}", soft_wrap=True)
    for header in ("User-Agent", "X-Mailer"):
        if header in mail:
            raise ProofFailed(f"the answer left with a {header} header")
    if "203.0.113.80" in arrived or "2001:db8:f::80" in arrived:
        raise ProofFailed("the answer left with the client's address in it")
