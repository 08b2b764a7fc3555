"""Certificates that the world believes, for the names by which it reaches a host: ACME with DNS-01, by lego.

The stack's own authority signed the host's key before (services/identity.py), so every service has a certificate from
its first moment, and no push waits for another's authority. See docs/decisions/two-certificates.md.
"""

from __future__ import annotations

import json

from model.network import Role
from model.stack import Host, Stack
from services import identity, postfix
from services.private import private
from services.render import render_tree
from services.service import Compile, File, SecretFile, Service, Unit, User

PROGRAM = "/usr/local/lib/posthorn/certificate"
STATE = "/var/lib/acme"
SETTINGS = f"{identity.FOLDER}certificate.json"
TIMER = "posthorn-certificate.timer"
USER = "posthorn-acme"


def first(stack: Stack, host: Host) -> str:
    """Until one was issued for the key of now, the certificate by the stack's own authority stands in its place.

    For the names of a domain, one of the services' certificates comes before that, if it holds them: a host of an
    earlier version has one for all names.
    """
    kept = " ".join(
        f"'{of or '-'} {identity.public(of)} {' '.join(names)}'" for of, names in stack.acme_certificates(host).items()
    )
    services = f"{STATE}/issued.pem {STATE}/next-issued.pem {identity.PUBLIC}"
    return f"""cd {identity.FOLDER}
key() {{ openssl x509 -in "$1" -noout -pubkey 2>/dev/null; }}
holds() {{
    file=$1; shift
    for name; do openssl x509 -in "$file" -noout -checkhost "$name" | grep -q ' does match ' || return 1; done
}}
own=$(key {identity.CERTIFICATE})
for one in {kept}; do
    set -- $one
    of=$1 public=$2; shift 2
    case $of in -) issued={STATE}/ ;; *) issued={STATE}/$of. ;; esac
    for file in "$public" "${{issued}}issued.pem" "${{issued}}next-issued.pem" {services} {identity.CERTIFICATE}; do
        test "$(key "$file")" = "$own" || continue
        case $file in "$public" | "$issued"* | {identity.CERTIFICATE}) break ;; esac
        holds "$file" "$@" && break
    done
    test "$file" = "$public" || cat "$file" > "$public"
done"""


def configure(stack: Stack, host: Host) -> Service:
    """lego, a timer, and a key that may change the host's own challenges in DNS and nothing else."""
    names = stack.acme_names(host)
    if stack.acme is None or not names:
        return Service(name="certificate")
    zones = {zone: stack.dns.servers[stack.dns.zones[zone] or ""] for name in names if (zone := stack.zone_of(name))}
    settings = {
        "host": host.name,
        "certificates": {of: list(those) for of, those in stack.acme_certificates(host).items()},
        "directory": stack.acme.directory,
        "contact": stack.acme.contact or stack.postmaster_address,
        "roots": identity.roots(stack),
        "zones": {zone: {"server": str(s.address), "port": s.port} for zone, s in sorted(zones.items())},
        "reload": [unit.name for unit in _readers(stack, host) if unit.reload_on],
    }
    key = private(stack, lambda keys: keys.tsig.get(host.fqdn, ""))
    return Service(
        name="certificate",
        packages=("lego", "knot-dnsutils", "openssl"),
        users=(User(USER, home=STATE),),
        files=(
            *render_tree("certificate", modes={PROGRAM: "0755"}),
            File(SETTINGS, json.dumps(settings, indent=1) + "\n"),
        ),
        secret_files=(SecretFile(f"{identity.FOLDER}tsig", "tsig", f"hmac-sha256:{host.fqdn}:{key}\n"),),
        compiles=(Compile(("sh", "-c", first(stack, host)), of=identity.FOLDER),),
        units=(Unit(TIMER, restart_on=(identity.FOLDER, "/etc/systemd/system/posthorn-certificate", PROGRAM)),),
    )


def _readers(stack: Stack, host: Host) -> tuple[Unit, ...]:
    """The units that show it to the world."""
    found: list[Unit] = []
    if host.has(Role.SMTP_IN) or host.has(Role.SMTP_OUT):
        found += postfix.units(stack, host)
    if host.has(Role.MAILDROP):
        found.append(Unit("dovecot.service", reload_on=(identity.FOLDER,)))
    if host.has(Role.FRONTEND):
        found.append(Unit("nginx.service", reload_on=(identity.FOLDER,)))
    return tuple(found)
