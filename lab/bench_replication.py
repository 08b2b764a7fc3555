"""How quick replication is, what it costs, and how long it takes to heal: with Dovecot's own replicator beside it.

Real mail by LMTP at one mailbox host, seen over IMAPS at the other. Dovecot's replicator is there on Debian 12 alone;
for its turn both hosts get another configuration for a while.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

from rich.console import Console
from rich.table import Table

from lab.mailboxes import Mailboxes
from lab.pair import HOSTS, PROGRAM, Pair, cut, eventually, ids, mails, pair_of, soak
from lab.state import State
from services.replication import TO_PEER

A, B = HOSTS
SERVICE, DOVECOT = "posthorn-sync.service", "dovecot.service"
SINGLES, BURST, SOAK_SECONDS = 60, 200, 60
PATIENCE = 330.0
"""Seconds until it counts as not healed: Dovecot's replicator may wait minutes before it tries again."""
CONFIGURATION = "/etc/dovecot/dovecot.conf"
NATIVE = f"""
plugin {{
  mail_replica = tcp:127.0.0.1:{TO_PEER}
}}
replication_max_conns = 10
service aggregator {{
  fifo_listener replication-notify-fifo {{
    mode = 0600
    user = vmail
  }}
  unix_listener replication-notify {{
    mode = 0600
    user = vmail
  }}
}}
service replicator {{
  process_min_avail = 1
}}
# It uses other commands of the peer.
doveadm_allowed_commands =
"""
"""What the manual of 2.3 asks for, beside the plugins ``notify`` and ``replication``."""


def milliseconds(lags: list[float]) -> str:
    """p50 / p95 (max) of some seconds."""
    ordered = sorted(1000 * lag for lag in lags)
    return f"{ordered[len(ordered) // 2]:.0f} / {ordered[int(0.95 * len(ordered))]:.0f} ({ordered[-1]:.0f})"


def singles(pair: Pair) -> list[float]:
    """One mail after another, each once the last has come."""
    lags = []
    for user, _ in zip(cycle(pair.users[:10]), range(SINGLES), strict=False):
        pair.b.start("arrivals", bases=pair.b.ask("numbers", users=[user]), count=1, seconds=30)
        taken = pair.a.ask("deliver", user=user, ids=ids(1))
        lags.append(pair.b.finish()[user][0] - taken[0])
    return lags


def burst(pair: Pair, source: Mailboxes, sink: Mailboxes) -> list[float]:
    """All mails as quickly as the host takes them."""
    users = list(pair.users[:10])
    sink.start("arrivals", bases=sink.ask("numbers", users=users), count=BURST // len(users), seconds=60)
    taken = {user: source.ask("deliver", user=user, ids=ids(BURST // len(users))) for user in users}
    seen = sink.finish()
    return [there - here for user in users for here, there in zip(taken[user], seen[user], strict=False)]


def processor(pair: Pair) -> float:
    """CPU seconds of Dovecot, the sync service and the tunnel so far, at both hosts."""
    groups = ("dovecot.service", SERVICE, "system-stunnel.slice")
    return sum(
        float(side.ask("processor_seconds", group=f"system.slice/{group}"))
        for side in (pair.a, pair.b)
        for group in groups
    )


def sync_cost(pair: Pair, syncs: int = 40) -> str:
    """CPU milliseconds of a sync of a small mailbox that has nothing to do: of doveadm here, and of all else."""
    user = pair.initiated_by(A)[0]
    pair.alike([user])
    before = processor(pair)
    one = f"doveadm sync -u {user} -l 10 -T 15 -f tcp:127.0.0.1:{TO_PEER}"
    said = pair.run(A, "bash", "-c", f"time for i in $(seq {syncs}); do {one}; done").stderr
    spent = processor(pair) - before
    parts = dict(line.split() for line in said.splitlines() if line.startswith(("user", "sys")))
    here = sum(60 * float(m) + float(s) for m, s in (text.rstrip("s").split("m") for text in parts.values()))
    return f"{1000 * here / syncs:.0f} ms here, {1000 * spent / syncs:.0f} ms of the daemons"


def mail_cost(pair: Pair) -> str:
    """CPU milliseconds of all daemons at both hosts for one mail after another, while nobody looks."""
    users = list(pair.users[:10])
    expected = sum(pair.b.ask("numbers", users=users).values()) + SINGLES
    before = processor(pair)
    for user, _ in zip(cycle(users), range(SINGLES), strict=False):
        pair.a.ask("deliver", user=user, ids=ids(1))
        time.sleep(0.2)
    time.sleep(2)
    spent = processor(pair) - before
    eventually(lambda: sum(pair.b.ask("numbers", users=users).values()) == expected)
    return f"{1000 * spent / SINGLES:.0f} ms"


Deliver = Callable[..., None]
Mishap = Callable[[list[str], Deliver], None]


def healed(pair: Pair, mishap: Mishap, seconds: float = PATIENCE) -> str:
    """Seconds from the end of a mishap until both hosts are alike; what was lost or doubled, if anything was."""
    users = [*pair.initiated_by(A)[:5], *pair.initiated_by(B)[:5]]
    try:
        before = pair.alike(users, seconds)
    except AssertionError:
        return "not tried: they are still different"
    wanted = [message_id for user in users for message_id in mails(before, user)]

    def deliver(users: list[str], count: int, side: Mailboxes = pair.a) -> None:
        for user in users:
            wanted.extend(new := ids(count))
            side.ask("deliver", user=user, ids=new)

    mishap(users, deliver)
    ended = time.monotonic()
    try:
        seen = pair.alike(users, seconds)
    except AssertionError:
        return f"not in {seconds:.0f} s"
    took = time.monotonic() - ended
    counted = Counter(message_id for user in users for message_id in mails(seen, user))
    wrong = [message_id for message_id in wanted if counted[message_id] != 1]
    return f"{took:.1f} s" + (f", {len(wrong)} mails LOST OR DOUBLED" if wrong else "")


def mishaps(pair: Pair) -> dict[str, Mishap]:
    """What goes wrong: mails come meanwhile."""

    def dovecot_away(users: list[str], deliver: Deliver) -> None:
        pair.run(B, "systemctl", "stop", DOVECOT)
        deliver(users, 2)
        time.sleep(4)
        pair.run(B, "systemctl", "start", DOVECOT)

    def hole(users: list[str], deliver: Deliver) -> None:
        with cut(pair, black_hole=True):
            deliver(users, 2)
            time.sleep(12)

    def both_sides(users: list[str], deliver: Deliver) -> None:
        with cut(pair):
            deliver(users, 1)
            deliver(users, 1, pair.b)
            time.sleep(7)

    def doveadm_killed(users: list[str], deliver: Deliver) -> None:
        deliver(users[:5], 4)
        for side in (pair.a, pair.b):
            side.ask("kill", names=["doveadm", "doveadm-server", "dsync-server"])
        deliver(users[5:], 4)

    def dovecot_killed(users: list[str], deliver: Deliver) -> None:
        deliver(users[:5], 4)
        pair.run(B, "systemctl", "kill", "-s", "KILL", DOVECOT)
        deliver(users[5:], 4)

    return {
        "Dovecot stopped for 4 s at the peer, 20 mails": dovecot_away,
        "black hole of 12 s, 20 mails": hole,
        "link down for 7 s, mails at both sides": both_sides,
        "Dovecot killed at the peer in a burst": dovecot_killed,
        "syncs killed at both in a burst": doveadm_killed,
    }


def own_mishaps(pair: Pair) -> dict[str, Mishap]:
    """What goes wrong with the sync service itself."""

    def killed(users: list[str], deliver: Deliver) -> None:
        deliver(users[:5], 4)
        pair.run(A, "systemctl", "kill", "-s", "KILL", SERVICE)
        deliver(users[5:], 4)

    def dead(users: list[str], deliver: Deliver) -> None:
        pair.run(B, "systemctl", "stop", SERVICE)
        deliver(users, 1)

    def lost(users: list[str], deliver: Deliver) -> None:
        pair.run(B, "sh", "-c", "rm -rf /var/vmail/*")
        started = time.monotonic()
        pair.run(B, PROGRAM, "reseed")
        print(f"  reseed took {time.monotonic() - started:.1f} s")

    return {
        "sync service killed in a burst": killed,
        "sync service dead at the peer, taken over": dead,
        "disk lost: after reseed has ended": lost,
    }


def soaked(pair: Pair) -> str:
    """Writers at both hosts for a minute: what came of it."""
    users = [*pair.initiated_by(A)[5:8], *pair.initiated_by(B)[5:8]]
    try:
        return str(soak(pair, users, SOAK_SECONDS))
    except AssertionError:
        return "still different a minute after the end"


@contextmanager
def native(pair: Pair) -> Iterator[None]:
    """Dovecot's own replicator in place of the sync service, for a while."""
    # Sections inherit the plugins that stand above them; and nobody listens to the events of Dovecot meanwhile.
    edit = f"sed -i -e 's/^mail_plugins = .*/& notify replication/' -e '/^metric sync_/,/^}}/d' {CONFIGURATION}"
    begin = f"systemctl stop {SERVICE}; cp -a {CONFIGURATION} /root/dovecot.conf && {edit} && cat >> {CONFIGURATION}"
    back = f"[ ! -f /root/dovecot.conf ] || {{ cat /root/dovecot.conf > {CONFIGURATION} && rm /root/dovecot.conf; }}"
    end = f"{back}; systemctl restart {DOVECOT} {SERVICE}"
    try:
        for host in HOSTS:
            shell = ["sh", "-c", f"{begin} && systemctl restart {DOVECOT}"]
            pair.state.run_in(host, shell, input=NATIVE, text=True, check=True)
        pair.both("doveadm", "replicator", "replicate", "*")
        pair.alike(seconds=60)
        yield
    finally:
        pair.both("sh", "-c", end)
        eventually(pair.quiet, 60)


def measure(pair: Pair, mishaps: dict[str, Mishap], console: Console, mend: Callable[[], object]) -> dict[str, str]:
    """All figures of whatever replicates now. ``mend`` is what its operator does after each mishap."""
    figures: dict[str, str] = {}

    def note(name: str, value: str) -> None:
        figures[name] = value
        console.print(f"  {name}: {value}")

    note(f"{SINGLES} single mails", milliseconds(singles(pair)))
    note("CPU for each mail at both hosts, its delivery included", mail_cost(pair))
    note(f"burst of {BURST}, {A} to {B}", milliseconds(burst(pair, pair.a, pair.b)))
    note(f"burst of {BURST}, {B} to {A}", milliseconds(burst(pair, pair.b, pair.a)))
    for name, mishap in mishaps.items():
        note(name, healed(pair, mishap))
        mend()
    note(f"writers at both hosts for {SOAK_SECONDS} s", soaked(pair))
    return figures


def bench(state: State, console: Console) -> None:
    """Measures the sync service, then Dovecot's replicator where there is one, and prints a table."""
    columns: dict[str, dict[str, str]] = {}
    with pair_of(state) as pair:
        console.print("posthorn-sync:")
        started = ("systemctl", "start", SERVICE)
        ours = measure(pair, mishaps(pair) | own_mishaps(pair), console, lambda: pair.run(B, *started))
        columns["posthorn-sync"] = {"CPU of one sync": sync_cost(pair), **ours}
        if {state.release_of(host) for host in HOSTS} == {12}:
            console.print("Dovecot's replicator:")
            with native(pair):
                everybody = ("doveadm", "replicator", "replicate", "-f", "*")
                theirs = measure(pair, mishaps(pair), console, lambda: pair.both(*everybody))
                columns["Dovecot's replicator"] = theirs
    releases = f"Debian {state.release_of(A)} and {state.release_of(B)}"
    table = Table(title=f"Replication on {releases}; lag: p50 / p95 (max) in ms", title_justify="left", show_edge=False)
    for column in ("what", *columns):
        table.add_column(column, overflow="fold")
    for name in dict.fromkeys(name for figures in columns.values() for name in figures):
        table.add_row(name, *(figures.get(name, "-") for figures in columns.values()))
    console.print(table)
