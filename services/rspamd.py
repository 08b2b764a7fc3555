"""The spam scanners, and what they have learnt."""

from __future__ import annotations

from collections.abc import Iterator

from model.mail import CATCH_ALL, Target
from model.network import Role
from model.stack import Host, Stack
from services import opendkim, postfix, smtp_in
from services.private import private
from services.render import render_tree
from services.senders import authors
from services.service import File, Listen, Sandbox, SecretFile, Service, Unit
from services.table import entries, table

SCANNER = 11333
CONTROLLER = 11334
"""On loopback: it trusts whoever comes there, so the firewall lets only those who have to (see `calls`)."""
REDIS = "/run/redis/redis-server.sock"
KEYPAIR = "/etc/rspamd/posthorn-keypair.inc"
SEAL = "/etc/rspamd/posthorn-seal.key"
SYSTEM = "/etc/systemd/system/"
RULES = ("/etc/rspamd/local.d/", "/etc/rspamd/rspamd.local.lua", KEYPAIR, SEAL)
"""What rspamd reads once. Its maps (`lists` and others) it reads again by itself, as soon as they change."""
SANDBOX = Sandbox(compiles=True, asks_addresses=True)
"""It begins as its own user. LuaJIT and Hyperscan make code of rules."""


def lists(stack: Stack) -> dict[str, tuple[object, ...]]:
    """What rspamd.local.lua looks up, by the ends of the names of its files."""
    allow, deny = stack.filter.allow, stack.filter.deny
    return {
        "domains": tuple(stack.domains),
        "allowed-clients": allow.clients,
        "allowed-senders": allow.senders,
        "allowed-forwarders": allow.forwarders,
        "denied-senders": deny.senders,
        "mailbox-hosts": stack.local_addresses(Role.MAILDROP),
    }


def elsewhere(stack: Stack) -> Iterator[tuple[str, str]]:
    """Addresses that lead out of the stack, wholly or in part; and the others, where a catch-all does.

    Those at the MX's own names are the postmaster's, and go where the postmaster's mail goes.
    """
    for domain in stack.domains:
        aliases = stack.resolved_aliases(domain)
        leads = {local: any(map(stack.leaves, targets)) for local, targets in aliases.items()}
        for local, out in leads.items():
            if out or leads.get(CATCH_ALL):
                yield f"{'' if local == CATCH_ALL else local}@{domain}", "yes" if out else "no"
    if stack.leaves(Target(stack.postmaster_address)):
        yield from ((address, "yes") for address, _ in smtp_in.own(stack))


def configure(stack: Stack, host: Host) -> Service:
    """A scanner that the proxies of all sites may ask, and a Redis that nobody else on the host can reach.

    Requests are encrypted with the scanners' key (rspamd's HTTPCrypt): they hold whole mails.
    """
    keypair = private(stack, lambda keys: keys.rspamd)
    return Service(
        name="rspamd",
        packages=("rspamd", "redis-server"),
        files=(
            *render_tree(
                "rspamd",
                stack=stack,
                host=host,
                port=SCANNER,
                largest=postfix.inside(stack),
                keypair=KEYPAIR,
                seal=SEAL,
                controller=CONTROLLER,
                redis=REDIS,
            ),
            *(render_tree("rspamd-private-root") if stack.dns.resolver.root_hints else ()),
            File("/etc/rspamd/posthorn-senders", table(authors(stack))),
            File(
                "/etc/rspamd/posthorn-elsewhere", table((f'"{address}"', leads) for address, leads in elsewhere(stack))
            ),
            *(File(f"/etc/rspamd/posthorn-{name}", entries(listed)) for name, listed in lists(stack).items()),
        ),
        secret_files=(
            SecretFile(
                KEYPAIR,
                "rspamd-key",
                f'keypair {{\n    pubkey = "{stack.keys.public.rspamd}";\n    privkey = "{keypair}";\n}}\n',
                mode="0640",
                group="_rspamd",
            ),
            SecretFile(SEAL, "seal", opendkim.signing_key(stack, stack.own_domain), mode="0640", group="_rspamd"),
        ),
        units=(
            Unit(
                "redis-server.service",
                restart_on=("/etc/redis/", f"{SYSTEM}redis-server.service.d/posthorn.conf"),
            ),
            Unit(
                "rspamd.service",
                restart_on=(*RULES, f"{SYSTEM}rspamd.service.d/posthorn.conf"),
                sandbox=SANDBOX,
            ),
        ),
        health=(
            {"kind": "http", "address": "127.0.0.1", "port": CONTROLLER, "path": "/ping", "tls": False, "status": [200]}
            | {"server_name": "localhost"},
        ),
        inside=("redis",),
        listens=(Listen(SCANNER, frm=stack.local_addresses(Role.SMTP_IN, Role.SMTP_OUT)),),
    )
