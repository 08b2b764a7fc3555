"""The operator's way to a host: its address, its pinned key, and the user that pushes come as."""

from __future__ import annotations

from collections.abc import Iterator

from model.stack import Stack
from ops.pulumi import OperatorError

USER = "root"


def command(stack: Stack, name: str, run: str = "") -> list[str]:
    """The ssh(1) command that goes to a host, or runs something there. Raises `OperatorError` for an unknown one."""
    host = stack.all_hosts.get(name)
    if host is None:
        raise OperatorError(f"HOST={name}: the stack has no such host (hosts: {', '.join(stack.all_hosts)})")
    options = (
        "StrictHostKeyChecking=yes",
        "UserKnownHostsFile=none",
        "GlobalKnownHostsFile=none",
        # The one key that counts, under whatever ssh calls the host (KnownHostsCommand in ssh_config(5)).
        f"KnownHostsCommand=/bin/echo %H {_key(host.host_key(stack.keys))}",
    )
    words = [word for option in options for word in ("-o", option)]
    return ["ssh", *words, f"{USER}@{host.management_address}", *([run] if run else [])]


def known_hosts(stack: Stack) -> Iterator[str]:
    """A line for each host, for other programs that go there (known_hosts in sshd(8))."""
    for host in stack.all_hosts.values():
        yield f"{host.name},{host.management_address} {_key(host.host_key(stack.keys))}"


def _key(public: str) -> str:
    """Type and key, without the comment."""
    return " ".join(public.split()[:2])
