"""One connection to each host, by the operator's own agent and a pinned host key, with one program and one answer."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import asyncssh

from model.stack import Host, Stack

CONNECT_SECONDS = 5.0
LOOK_SECONDS = 300.0
"""Who answers at all has time: in an emulated machine everything takes twenty times as long."""

# Short and constant, as the agent's own: the program and its task come on standard input.
RUN = """exec python3 -c 'import json,sys
task = json.load(sys.stdin)
scope = {"__name__": "look"}
exec(compile(task["look"], "look", "exec"), scope)
scope["main"](task)'"""


@dataclass(frozen=True)
class Seen:
    """What a host said of itself, and how its clock compares; or why it said nothing."""

    report: dict[str, Any] | None = None
    offset: float = 0.0
    """Seconds that the host's clock is ahead of this machine's."""
    error: str = ""
    kind: str = ""
    """Of the error: silent, refused, key, login or other."""


async def _connected(address: str) -> socket.socket:
    """A connection to the SSH port. Raises `TimeoutError` or `OSError`."""
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        connecting = asyncio.get_running_loop().sock_connect(connection, (address, 22))
        await asyncio.wait_for(connecting, CONNECT_SECONDS)
    except BaseException:
        connection.close()
        raise
    return connection


async def look(stack: Stack, host: Host, task: dict[str, Any], now: Callable[[], float]) -> Seen:
    """Runs the look on a host. Never raises for what the host or the network does. ``now`` tells the time."""
    key = asyncssh.import_public_key(host.host_key(stack.keys))
    try:
        opened = asyncssh.connect(
            sock=await _connected(str(host.management_address)),
            username="root",
            known_hosts=([key], [], []),
            # A server with several keys is to show the one that is pinned.
            server_host_key_algs=[key.get_algorithm()],
            config=None,
            connect_timeout=LOOK_SECONDS,
            login_timeout=LOOK_SECONDS,
        )
        async with await opened as connection:
            started = now()
            run = connection.run(RUN, input=json.dumps(task), check=False)
            done = await asyncio.wait_for(run, LOOK_SECONDS)
            ended = now()
    except asyncssh.HostKeyNotVerifiable:
        return Seen(error="shows another SSH host key than the one that is pinned", kind="key")
    except asyncssh.PermissionDenied:
        return Seen(error="lets none of the keys of the SSH agent in", kind="login")
    except TimeoutError:
        return Seen(error="does not answer", kind="silent")
    except ConnectionRefusedError:
        return Seen(error="refuses SSH", kind="refused")
    except (OSError, asyncssh.Error) as error:
        return Seen(error=getattr(error, "strerror", None) or str(error) or type(error).__name__, kind="other")
    try:
        report: dict[str, Any] = json.loads(str(done.stdout))
    except ValueError:
        return Seen(error=f"cannot be looked at: {str(done.stderr).strip()[-300:]}", kind="other")
    # It looked at its clock at some moment in between: what lies in between is no difference.
    there = report["time"]
    return Seen(report=report, offset=min(there - started, 0.0) + max(there - ended, 0.0))
