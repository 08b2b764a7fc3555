"""The servers of the lab's internet: a signed root, the zones below it, blocklists, a resolver, and Debian packages.

Knot serves every zone and takes the stack's updates; Unbound resolves for the client, the foreign host and the
operator; NGINX serves the packages; Pebble issues certificates by ACME. All run in one container, in the namespace of
the internet's router.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from lab import image, repository
from lab.network import DNS, FOREIGN, LAN4, LAN6, RESOLVER
from lab.state import LabError, State
from ops.keys import new_authority, sign_certificate, tls_key
from ops.stackfile import write_atomically

NAME = "internet"
READY_SECONDS = 30.0
SERIAL = "1 3600 600 604800 60"


@dataclass(frozen=True)
class Zone:
    """A zone of the lab: its parent, its first records, and whether the stack may change it."""

    name: str
    parent: str | None
    records: str = ""
    updates: bool = False


POLICIES = f"""\
_dmarc.reject 3600 TXT "v=DMARC1; p=reject; psd=n"
reject 3600 TXT "v=spf1 ip4:{LAN4}.{FOREIGN} -all"
_dmarc.quarantine 3600 TXT "v=DMARC1; p=quarantine; psd=n"
_dmarc.trial 3600 TXT "v=DMARC1; p=reject; t=y; psd=n"
_dmarc.mixed 3600 TXT "v=DMARC1; p=none; sp=quarantine; np=reject; psd=n"
there.mixed 3600 TXT "nothing but"
there.mixed 3600 MX 10 mx
_dmarc.strict 3600 TXT "v=DMARC1; p=reject; aspf=s; psd=n"
sub.strict 3600 TXT "v=spf1 ip4:{LAN4}.{FOREIGN} -all"
_dmarc.suffix 3600 TXT "v=DMARC1; p=reject; psd=y"
one.suffix 3600 TXT "v=spf1 ip4:{LAN4}.{FOREIGN} -all"
_dmarc.doubled 3600 TXT "v=DMARC1; p=reject; psd=n"
_dmarc.doubled 3600 TXT "v=DMARC1; p=quarantine; psd=n"
_dmarc.loop 3600 CNAME _dmarc.pool
_dmarc.pool 3600 CNAME _dmarc.loop
soft 3600 TXT "v=spf1 ~all"
soft 3600 MX 10 mx
lists 3600 TXT "v=spf1 ip4:{LAN4}.{FOREIGN} -all"
"""
"""What domains below far.example ask by DMARC (RFC 9989): psd=n makes each an organization of its own."""
FAR = f"""
@ 3600 MX 10 mx
@ 3600 TXT "v=spf1 ip4:{LAN4}.{FOREIGN} ip6:{LAN6}{FOREIGN} -all"
_dmarc 3600 TXT "v=DMARC1; p=none"
{POLICIES}mx 3600 A {LAN4}.{FOREIGN}
mx 3600 AAAA {LAN6}{FOREIGN}
mx 3600 TXT "v=spf1 a -all"
"""
BLOCKLIST = """
2.0.0.127 60 A 127.0.0.2
66.113.0.203 60 A 127.0.0.4
71.113.0.203 60 A 127.0.0.4
67.113.0.203 60 A 127.255.255.254
spam.example.dbl 60 A 127.0.1.2
*.spam.example.dbl 60 A 127.0.1.2
error.example.dbl 60 A 127.255.255.254
*.error.example.dbl 60 A 127.255.255.254
"""
REVERSE = f"""
{FOREIGN} 3600 PTR mx.far.example.
69 3600 PTR host.spam.example.
70 3600 PTR host.error.example.
"""
SERVERS = "".join(f"{host} 3600 A {LAN4}.{DNS}\n{host} 3600 AAAA {LAN6}{DNS}\n" for host in ("ns", "packages", "acme"))

ZONES = (
    Zone(".", None),
    Zone("example", ".", SERVERS),
    Zone("far.example", "example", FAR),
    Zone("dnsbl.example", "example", BLOCKLIST),
    Zone("hill.example", "example", updates=True),
    Zone("net.hill.example", "hill.example", updates=True),
    Zone("dale.example", "example", updates=True),
    Zone("moor.example", "example", updates=True),
    Zone("100.51.198.in-addr.arpa", ".", updates=True),
    Zone("18.198.in-addr.arpa", ".", updates=True),
    Zone("113.0.203.in-addr.arpa", ".", REVERSE),
    Zone(
        "8.b.d.0.1.0.0.2.ip6.arpa",
        ".",
        f"{'.'.join(reversed('000f' + '0000' * 4 + f'{FOREIGN:0>4}'))} 3600 PTR mx.far.example.\n",
        updates=True,
    ),
)


def _knot(state: State, hosts: Sequence[str] = ()) -> str:
    """Knot's configuration. ``hosts`` are names of rules in HOSTS, by which hosts answer challenges."""
    rules = f"    acl: [{', '.join(('update', *hosts))}]\n"
    zones = "".join(
        f"  - domain: {zone.name}\n    file: {zone.name.rstrip('.') or 'root'}.zone\n{rules if zone.updates else ''}"
        for zone in ZONES
    )
    included = f"include: {HOSTS}\n" if hosts else ""
    return f"""{included}server:
    listen: [{LAN4}.{DNS}@53, {LAN6}{DNS}@53]
    rundir: /run/knot
log:
  - target: syslog
    any: warning
key:
  - id: {state.tsig_name}
    algorithm: hmac-sha256
    secret: {state.tsig_secret}
acl:
  - id: update
    key: {state.tsig_name}
    action: [update, transfer]
policy:
  - id: lab
    algorithm: ecdsap256sha256
    single-type-signing: on
    manual: on
template:
  - id: default
    storage: /var/lib/knot
    dnssec-signing: on
    dnssec-policy: lab
    zonefile-load: difference-no-serial
    journal-content: all
    zonefile-sync: -1
zone:
{zones}"""


def _zone_text(zone: Zone, delegations: str) -> str:
    origin = zone.name if zone.name == "." else f"{zone.name}."
    apex = f"$ORIGIN {origin}\n@ 3600 SOA ns.example. hostmaster.example. {SERIAL}\n@ 3600 NS ns.example.\n"
    return f"{apex}{zone.records}{delegations}"


PACKAGES = f"""server {{
    listen {LAN4}.{DNS}:80;
    listen [{LAN6}{DNS}]:80;
    server_name {repository.HOST};
    root /srv/packages;
}}
"""
UNBOUND = f"""server:
    interface: {LAN4}.{RESOLVER}
    interface: {LAN6}{RESOLVER}
    access-control: 0.0.0.0/0 allow
    access-control: ::/0 allow
    root-hints: /etc/unbound/lab-root.hints
    trust-anchor-file: /etc/unbound/lab-root.key
    local-zone: "100.51.198.in-addr.arpa." nodefault
    local-zone: "113.0.203.in-addr.arpa." nodefault
    local-zone: "8.b.d.0.1.0.0.2.ip6.arpa." nodefault
    # The lab's records come and go within seconds.
    cache-max-negative-ttl: 1
    cache-max-ttl: 5
"""


KEYS = r"""set -e
keymgr="runuser -u knot -- keymgr -c /etc/knot/knot.conf"
mkdir -p /var/lib/knot/keys && chown -R knot: /var/lib/knot
for zone in ZONES; do
    $keymgr "$zone" generate algorithm=ecdsap256sha256 ksk=yes zsk=yes >/dev/null
    $keymgr "$zone" ds | grep ' 2 [0-9A-Fa-f]*$'
done
"""


HOSTS = "/etc/knot/hosts.conf"


def allow(state: State, rules: str, hosts: Sequence[str]) -> None:
    """Tells Knot the keys and rules of the stack's hosts. Does nothing when it knows them."""
    if state.run_in(NAME, ["cat", HOSTS], capture_output=True, text=True).stdout == rules:
        return
    _write(state, HOSTS, rules)
    _write(state, "/etc/knot/knot.conf", _knot(state, hosts))
    _in(state, "sh", "-c", f"chown knot: {HOSTS} && chmod 600 {HOSTS} && knotc conf-check && knotc reload")


PEBBLE_UNIT = f"""[Unit]
Description=An authority that speaks ACME
After=unbound.service
[Service]
Environment=PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0
ExecStart=/usr/bin/pebble -config /etc/pebble/config.json -dnsserver {LAN4}.{RESOLVER}:53
[Install]
WantedBy=multi-user.target
"""
PEBBLE = {
    "listenAddress": f"{LAN4}.{DNS}:14000",
    "managementListenAddress": "127.0.0.1:15000",
    "certificate": "/etc/pebble/server.pem",
    "privateKey": "/etc/pebble/server.key",
    "httpPort": 80,
    "tlsPort": 443,
    "ocspResponderURL": "",
    "externalAccountBindingRequired": False,
}
ROOT = """import ssl,time,urllib.request as u
while True:
    try:
        print(u.urlopen("https://127.0.0.1:15000/roots/0", context=ssl._create_unverified_context()).read().decode())
        break
    except OSError:
        time.sleep(0.1)
"""


def _authority(state: State) -> None:
    """Starts Pebble, which makes a new root each time, and takes that for what the lab's world believes."""
    if not state.acme_https:
        certificate, key = new_authority("acme.example")
        server_key = tls_key()
        server = sign_certificate(["acme.example"], server_key, certificate, key)
        _write(state, "/etc/pebble/config.json", json.dumps({"pebble": PEBBLE}))
        _write(state, "/etc/pebble/server.pem", server)
        _write(state, "/etc/pebble/server.key", server_key)
        _write(state, "/etc/systemd/system/pebble.service", PEBBLE_UNIT)
        state.acme_https = certificate
        state.save()
    _in(state, "sh", "-c", "systemctl daemon-reload; systemctl enable --quiet --now pebble")
    write_atomically(state.world_file, _in(state, "timeout", "30", "python3", "-c", ROOT).strip() + "\n")


def configure(state: State) -> None:
    """Makes keys and zones in the running container, and starts the name servers. Sets the lab's trust anchor."""
    if not state.trust_anchor:
        _write(state, "/etc/knot/knot.conf", _knot(state))
        names = " ".join(zone.name for zone in ZONES)
        made = _in(state, "sh", "-c", KEYS.replace("ZONES", names))
        ds = {line.split()[0].rstrip(".") or ".": line for line in made.splitlines()}
        for zone in ZONES:
            delegations = "".join(
                f"{child.name}. 3600 NS ns.example.\n{ds[child.name]}\n" for child in ZONES if child.parent == zone.name
            )
            glue = f"ns.example. 3600 A {LAN4}.{DNS}\nns.example. 3600 AAAA {LAN6}{DNS}\n" if zone.name == "." else ""
            _write(state, f"/var/lib/knot/{zone.name.rstrip('.') or 'root'}.zone", _zone_text(zone, delegations + glue))
        state.trust_anchor = (ds["."],)
        _write(state, "/etc/unbound/lab-root.key", ds["."] + "\n")
        _write(
            state,
            "/etc/unbound/lab-root.hints",
            f". 3600000 NS ns.example.\nns.example. 3600000 A {LAN4}.{DNS}\nns.example. 3600000 AAAA {LAN6}{DNS}\n",
        )
        _write(state, "/etc/unbound/unbound.conf.d/lab.conf", UNBOUND)
        _write(state, "/etc/default/unbound", "ROOT_TRUST_ANCHOR_UPDATE=false\n")
        _write(state, "/etc/nginx/sites-enabled/default", PACKAGES)
        state.save()
    _in(
        state,
        "sh",
        "-c",
        "rm -f /etc/unbound/unbound.conf.d/root-auto-trust-anchor-file.conf; chown -R knot: /var/lib/knot;"
        " systemctl enable --quiet knot unbound nginx; systemctl start knot unbound nginx",
    )
    _authority(state)


def serve_packages(state: State, releases: Collection[int]) -> None:
    """Puts the packages that belong to the images of some releases where NGINX finds them."""
    for release in releases:
        made = repository.folder(image.folder(release))
        packed = subprocess.run(["tar", "-C", made, "-c", "."], capture_output=True, check=True)
        done = state.run_in(NAME, ["sh", "-ec", "mkdir -p /srv/packages; tar -C /srv/packages -x"], input=packed.stdout)
        if done.returncode:
            raise LabError(f"internet: the packages for Debian {release} could not be put there")


def wait_until_ready(state: State) -> None:
    """Waits until the resolver answers for the root with a checked signature."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        done = subprocess.run(
            state.command_in(
                NAME, ["kdig", f"@{LAN4}.{RESOLVER}", "+dnssec", "+timeout=1", "+retry=0", "mx.far.example", "A"]
            ),
            capture_output=True,
            text=True,
        )
        if " ad" in done.stdout.partition("Flags:")[2].partition(";")[0]:
            return
        if time.monotonic() > deadline:
            raise LabError(f"the lab's resolver gives no signed answer: {done.stdout}{done.stderr}")
        time.sleep(0.1)


def _write(state: State, path: str, text: str) -> None:
    done = state.run_in(NAME, ["install", "-D", "-m", "644", "/dev/stdin", path], input=text, text=True)
    if done.returncode:
        raise LabError(f"internet: {path} could not be written")


def _in(state: State, *command: str) -> str:
    done = state.run_in(NAME, list(command), capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"internet: {' '.join(command[:2])}: {done.stderr.strip()}")
    return str(done.stdout)


def add_records(state: State, zone: str, records: Iterable[tuple[str, str, str]], ttl: int = 60) -> None:
    """Adds records (owner, type, data) to a zone of the lab's own, in one step and at once."""
    commands = (
        f"zone-begin {zone}",
        *(f"zone-set {zone} {owner} {ttl} {kind} {shlex.quote(data)}" for owner, kind, data in records),
        f"zone-commit {zone}",
    )
    _in(state, "sh", "-ec", "".join(f"knotc {command} >/dev/null\n" for command in commands))
