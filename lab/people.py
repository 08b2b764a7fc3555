"""The people of the lab: two hundred users with addresses, quotas, filters and mail, as a house of that size has them.

The committed stack has two accounts, whom tests know by name. The others are made here, the same ones each time, and
stand in the live stack file alone. All of them have one password, so that its hash is made once.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from itertools import islice, product
from typing import Any

from lab.mailboxes import Mailboxes

HOST = "maildrop-oak"
"""The mailbox host of the most preferred site: all sessions are there."""
DOMAIN = "hill.example"
FIRST = ("ada", "bo", "cem", "dora", "emil", "fay", "gus", "hana", "ivo", "jun", "kim", "lea", "max", "nora")
LAST = (
    "abel", "berg", "cole", "dietz", "ek", "fox", "gray", "holm", "ito", "jensen", "kaya", "lund", "meyer", "novak",
)  # fmt: skip
ODD = (
    # The shortest and the longest; what YAML reads as something else; users of the hosts; one that begins another.
    "q", "long-" + "x" * 58, "null", "on", "1e5", "007", "0x1f", "12-11-10", "root", "nobody", "vmail", "dovecot",
    "kim.lun", "a.b-c_d.e",
)  # fmt: skip
REGULAR = tuple(f"{first}.{last}" for last, first in islice(product(LAST, FIRST), 200 - 2 - len(ODD)))
PEOPLE = (*ODD, *REGULAR)
"""With ann and ben they are two hundred. Of these kinds are the first: a lab may have some of them alone."""
FULL = REGULAR[:4]
"""Their mailboxes are full: what comes for them waits."""
FILTERED = REGULAR[4:24]
"""They have a filter (RFC 5228) that puts mails of lists into a folder."""
FILTER = """require ["fileinto", "mailbox"];
if header :contains "Subject" "[list]" { fileinto :create "Lists"; }
"""
FULL_QUOTA = "1M"
FULL_WITH_BYTES = (1_000_000, 60_000)
"""The last mail that fits to a part is still let in."""
QUOTAS = ("20M", "500M", "5G")


def accounts(names: Sequence[str], password: str) -> dict[str, dict[str, Any]]:
    """What stands at ``accounts`` in the stack file; ``password`` is the hash of the one that all of them have."""
    quotas = {name: QUOTAS[number % len(QUOTAS)] for number, name in enumerate(names) if number % 2}
    quotas |= dict.fromkeys(FULL, FULL_QUOTA)
    return {name: {"password": password} | ({"quota": quotas[name]} if name in quotas else {}) for name in names}


def aliases(names: Sequence[str]) -> dict[str, Any]:
    """What stands at the aliases of their domain: an address each, some with two, and one that is everybody."""
    own: Mapping[str, Any] = {name: name for name in names}
    second = {f"{name.replace('.', '-')}&co": f"{name}+co" for name in REGULAR[::10] if name in names}
    return {**own, **second, "everybody": list(names)}


def move_in(mailboxes: Mailboxes, names: Sequence[str]) -> None:
    """Gives mail to some of them, by LMTP, and filters. `HOST` is where ``mailboxes`` has to be.

    Raises `lab.mailboxes.Refused` with the host's words.
    """
    for name in (name for name in (*ODD, *FULL, *FILTERED) if name in names):
        for size in FULL_WITH_BYTES if name in FULL else (0,):
            mailboxes.ask("deliver", user=name, ids=[f"<{secrets.token_hex(8)}@far.example>"], size=size)
    for name in (name for name in FILTERED if name in names):
        mailboxes.ask("put_filter", user=name, script=FILTER)
