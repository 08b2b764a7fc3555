"""OpenDKIM: signs what the stack's users send (RFC 6376)."""

from __future__ import annotations

from model.stack import Host, Stack
from services.private import private
from services.render import render_tree
from services.service import Directory, File, SecretFile, Service, Unit

KEYS = "/etc/opendkim/keys"
DROP_IN = "/etc/systemd/system/opendkim.service.d/"


def configure(stack: Stack, host: Host) -> Service:
    """One key per domain, which signs for its subdomains too."""
    selector = stack.dkim.selector
    names = {domain: f"{KEYS}/{selector}-{domain}.private" for domain in stack.sending_domains}
    key_table = "".join(f"{domain} {domain}:{selector}:{path}\n" for domain, path in sorted(names.items()))
    # The first match wins: the domain that is most alike comes before those above it.
    longest = sorted(stack.sending_domains, key=lambda domain: (-domain.count("."), domain))
    signing_table = "".join(f"*@{domain} {domain}\n*@*.{domain} {domain}\n" for domain in longest)

    def key(domain: str) -> str:
        return private(stack, lambda keys: keys.dkim[domain][selector])

    return Service(
        name="opendkim",
        packages=("opendkim",),
        files=(
            *render_tree("opendkim", stack=stack, host=host),
            File("/etc/opendkim/keytable", key_table),
            File("/etc/opendkim/signers", signing_table),
        ),
        directories=(Directory("/etc/opendkim"), Directory(KEYS)),
        secret_files=tuple(
            SecretFile(path, f"dkim-{selector}-{domain}", key(domain), owner="opendkim", group="opendkim")
            for domain, path in names.items()
        ),
        units=(Unit("opendkim.service", restart_on=("/etc/opendkim.conf", "/etc/opendkim/", DROP_IN)),),
    )
