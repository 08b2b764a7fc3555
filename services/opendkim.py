"""OpenDKIM: signs what the stack's users send, and what its hosts themselves say (RFC 6376)."""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services.private import private
from services.render import render_tree
from services.service import Call, Directory, File, Sandbox, SecretFile, Service, Unit

KEYS = "/etc/opendkim/keys"
DROP_IN = "/etc/systemd/system/opendkim.service.d/"
PORT = 8891
MILTER = f"inet:127.0.0.1:{PORT}"
USER = "opendkim"

SANDBOX = Sandbox(user=USER)


def signing_key(stack: Stack, domain: str) -> str:
    """The private key that signs for a domain now."""
    return private(stack, lambda keys: keys.dkim[domain][stack.dkim.selector])


def configure(stack: Stack, host: Host) -> Service:
    """One key per domain, which signs for its subdomains too.

    Where users submit, and the mailbox hosts send, there are those of all domains; smtp-in signs what it says itself,
    with the service's.
    """
    selector = stack.dkim.selector
    domains = tuple(stack.sending_domains) if host.has(Role.SMTP_OUT) else (stack.own_domain,)
    speaks_for = stack.local_addresses(Role.MAILDROP) if host.has(Role.SMTP_OUT) else ()
    names = {domain: f"{KEYS}/{selector}-{domain}.private" for domain in domains}
    key_table = "".join(f"{domain} {domain}:{selector}:{path}\n" for domain, path in sorted(names.items()))
    # The first match wins: the domain that is most alike comes before those above it.
    longest = sorted(domains, key=lambda domain: (-domain.count("."), domain))
    signing_table = "".join(f"*@{domain} {domain}\n*@*.{domain} {domain}\n" for domain in longest)

    return Service(
        name="opendkim",
        packages=("opendkim",),
        files=(
            *render_tree("opendkim", speaks_for=speaks_for, port=PORT),
            File("/etc/opendkim/keytable", key_table),
            File("/etc/opendkim/signers", signing_table),
        ),
        directories=(Directory("/etc/opendkim"), Directory(KEYS)),
        secret_files=tuple(
            SecretFile(path, f"dkim-{selector}-{domain}", signing_key(stack, domain), owner=USER, group=USER)
            for domain, path in names.items()
        ),
        calls=(Call(PORT, "postfix"),),
        inside=(USER,),
        units=(
            Unit("opendkim.service", restart_on=("/etc/opendkim.conf", "/etc/opendkim/", DROP_IN), sandbox=SANDBOX),
        ),
    )
