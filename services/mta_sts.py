"""The MTA-STS policy of the stack (RFC 8461): what TLS a sender has to meet at our MX."""

from __future__ import annotations

import hashlib

from model.stack import Stack

MAX_AGE = {"none": 86400, "testing": 86400, "enforce": 604800}
"""How long a sender remembers it, in seconds. While it is tried out, a day is enough."""


def policy(stack: Stack) -> str:
    """The text that every domain serves (RFC 8461 section 3.2). All domains have the same MX."""
    mode = stack.dns.mta_sts
    lines = (
        "version: STSv1",
        f"mode: {mode}",
        f"mx: {stack.public_name('smtp_in')}",
        f"max_age: {MAX_AGE[mode]}",
    )
    return "\n".join(lines) + "\n"


def policy_id(stack: Stack) -> str:
    """The id in DNS, by which a sender sees that the policy changed: it follows from the content."""
    return hashlib.sha256(policy(stack).encode()).hexdigest()[:20]
