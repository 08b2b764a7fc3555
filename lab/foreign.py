"""A mail host of somebody else: mx.far.example. It checks SPF, DKIM and DMARC, and says what it found.

Nothing in it is shared with the hosts of the stack: where they filter with rspamd, it checks with OpenDKIM,
OpenDMARC and pyspf.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from lab import internet
from lab.containers import upper
from lab.network import FOREIGN, LAN4, LAN6
from lab.state import RESOLVER, LabError, State
from ops.keys import new_authority, sign_certificate, tls_key

NAME = "foreign"
HOST = "mx.far.example"
MAILBOX = "/home/bob/Maildir"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Demand:
    """What one of the foreign host's domains has published about its TLS. None: nothing of that kind."""

    dane: bool | None = None
    """Whether the TLSA record is that of the host's key, or of another (RFC 7672)."""
    sts: bool | None = None
    """Whether the MTA-STS policy names the domain's mail host, or another (RFC 8461)."""


DEMANDS = {
    "dane": Demand(dane=True),
    "dane-broken": Demand(dane=False),
    "sts": Demand(sts=True),
    "sts-broken": Demand(sts=False),
    "dane-over-sts": Demand(dane=True, sts=False),
    "sts-under-dane": Demand(dane=False, sts=True),
}
"""Domains below far.example, by what they demand of whoever brings them mail."""

MAIN_CF = f"""compatibility_level = 3.6
myhostname = {HOST}
mydomain = far.example
myorigin = far.example
mydestination = far.example, {", ".join(f"{name}.far.example" for name in DEMANDS)}
recipient_delimiter = +
mynetworks = 127.0.0.0/8
inet_interfaces = all
smtp_bind_address = {LAN4}.{FOREIGN}
smtp_bind_address6 = {LAN6}{FOREIGN}
alias_maps =
alias_database =
home_mailbox = Maildir/
smtpd_tls_chain_files = /etc/postfix/tls.key, /etc/postfix/tls.pem
smtpd_tls_security_level = may
smtp_tls_security_level = may
smtp_tls_loglevel = 1
# A lab has no time: what was greylisted is tried again soon.
minimal_backoff_time = 3s
maximal_backoff_time = 10s
queue_run_delay = 2s
smtp_connect_timeout = 5s
smtp_helo_timeout = 10s
smtpd_recipient_restrictions =
    permit_mynetworks, reject_unauth_destination, check_policy_service unix:private/policy-later,
    check_policy_service unix:private/policy-spf
policy-spf_time_limit = 60s
smtpd_milters = inet:127.0.0.1:8891, inet:127.0.0.1:8893
non_smtpd_milters = inet:127.0.0.1:8891
milter_default_action = tempfail
"""
MASTER_ADD = """policy-spf unix - n n - 0 spawn user=nobody argv=/usr/bin/policyd-spf
policy-later unix - n n - 0 spawn user=nobody argv=/usr/bin/python3 /usr/local/lib/policy-later
"""
POLICY_LATER = """# Whoever writes to bob+later… is asked to come again after three seconds (SMTPD_POLICY_README).
import os, sys, time
asked = {}
for line in sys.stdin:
    name, _, value = line.strip().partition("=")
    asked[name] = value
    if not name:
        word = "action=DUNNO"
        if asked["recipient"].startswith("bob+later"):
            seen = "/var/tmp/" + asked["recipient"]
            if not os.path.exists(seen):
                open(seen, "w").close()
            if time.time() < os.path.getmtime(seen) + 3:
                word = "action=451 4.7.1 come again"
        print(word, end="\\n\\n", flush=True)
        asked = {}
"""
POLICIES = """# Serves the MTA-STS policies of some domains (RFC 8461 section 3.3).
import http.server, json, ssl
policies = json.load(open("/etc/policies.json"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        text = policies.get(self.headers["Host"]) if self.path == "/.well-known/mta-sts.txt" else None
        self.send_response(200 if text else 404)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write((text or "").encode())
server = http.server.ThreadingHTTPServer(("203.0.113.25", 443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/etc/postfix/tls.pem", "/etc/postfix/tls.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
POLICIES_UNIT = """[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/policies
[Install]
WantedBy=multi-user.target
"""
SPF_CONF = """debugLevel = 0
TestOnly = 1
HELO_reject = False
Mail_From_reject = Fail
PermError_reject = False
TempError_Defer = True
Header_Type = AR
Authserv_Id = mx.far.example
skip_addresses = 127.0.0.0/8
"""
OPENDKIM_CONF = f"""Syslog yes
UMask 007
Mode sv
Domain far.example
Selector far
KeyFile /etc/opendkim/far.key
Canonicalization relaxed/relaxed
OversignHeaders From
MaximumHeaders 0
AuthservID {HOST}
AlwaysAddARHeader yes
Nameservers {RESOLVER}
InternalHosts 127.0.0.1
Socket inet:8891@127.0.0.1
UserID opendkim
"""
OPENDMARC_CONF = f"""AuthservID {HOST}
TrustedAuthservIDs {HOST}
SPFSelfValidate true
SPFIgnoreResults true
RejectFailures true
IgnoreHosts /etc/opendmarc/ignore.hosts
Socket inet:8893@127.0.0.1
UserID opendmarc
Syslog true
"""
POLICY = "version: STSv1\nmode: enforce\nmx: {host}.{name}.far.example\nmax_age: 86400\n"
SET_UP = r"""set -e
id bob >/dev/null 2>&1 || useradd --create-home --shell /usr/sbin/nologin bob
mkdir -p /etc/opendmarc && echo 127.0.0.1 > /etc/opendmarc/ignore.hosts
chown opendkim: /etc/opendkim/far.key && chmod 600 /etc/opendkim/far.key
chmod 600 /etc/postfix/tls.key
cp /usr/share/postfix/master.cf.dist /etc/postfix/master.cf && cat /etc/postfix/master.add >> /etc/postfix/master.cf
# In the foreground: a PID file may come too late to be believed.
for milter in opendkim opendmarc; do
    mkdir -p /etc/systemd/system/$milter.service.d
    printf '[Service]\nType=simple\nPIDFile=\nExecStart=\nExecStart=/usr/sbin/%s -f\n' $milter \
        > /etc/systemd/system/$milter.service.d/lab.conf
done
systemctl daemon-reload
systemctl enable --quiet opendkim opendmarc postfix policies
systemctl restart opendkim opendmarc postfix policies
"""


def configure(state: State) -> None:
    """Sets the foreign host up in its running container, and publishes its DKIM key. Does nothing the second time."""
    done = upper(state, NAME).parent / "configured"
    if done.exists():
        return
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    ).decode()
    authority, authority_key = new_authority("the lab's internet")
    names = [HOST, *(f"{label}.{name}.far.example" for name in DEMANDS for label in ("mx", "mta-sts"))]
    tls = tls_key()
    certificate = sign_certificate(names, tls, authority, authority_key)
    records = [("far._domainkey", "TXT", _txt(f"v=DKIM1; k=rsa; p={_b64(public)}"))]
    records += [record for name, demand in DEMANDS.items() for record in _records(name, demand, certificate)]
    internet.add_records(state, "far.example", records)
    policies = {
        f"mta-sts.{name}.far.example": POLICY.format(name=name, host="mx" if demand.sts else "elsewhere")
        for name, demand in DEMANDS.items()
        if demand.sts is not None
    }
    for path, text in (
        ("/etc/postfix/main.cf", MAIN_CF),
        ("/etc/postfix/master.add", MASTER_ADD),
        ("/etc/postfix-policyd-spf-python/policyd-spf.conf", SPF_CONF),
        ("/etc/opendkim.conf", OPENDKIM_CONF),
        ("/etc/opendmarc.conf", OPENDMARC_CONF),
        ("/etc/opendkim/far.key", private),
        ("/etc/postfix/tls.key", tls),
        ("/etc/postfix/tls.pem", certificate),
        ("/usr/local/lib/policy-later", POLICY_LATER),
        ("/usr/local/lib/policies", POLICIES),
        ("/etc/policies.json", json.dumps(policies)),
        ("/etc/systemd/system/policies.service", POLICIES_UNIT),
    ):
        _in(state, ["install", "-D", "-m", "644", "/dev/stdin", path], text)
    _in(state, ["sh", "-c", SET_UP])
    state.world_authority = authority
    state.save()
    done.touch()


def _records(name: str, demand: Demand, certificate: str) -> Iterator[tuple[str, str, str]]:
    """The records of a domain below far.example that demands something."""
    yield name, "MX", f"10 mx.{name}.far.example."
    yield f"mx.{name}", "A", f"{LAN4}.{FOREIGN}"
    if demand.dane is not None:
        key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
        info = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        digest = hashlib.sha256(info if demand.dane else b"another key").hexdigest()
        yield f"_25._tcp.mx.{name}", "TLSA", f"3 1 1 {digest}"
    if demand.sts is not None:
        yield f"_mta-sts.{name}", "TXT", '"v=STSv1; id=1"'
        yield f"mta-sts.{name}", "A", f"{LAN4}.{FOREIGN}"


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _txt(text: str) -> str:
    """A TXT record's strings of at most 255 characters (RFC 1035 section 3.3.14)."""
    return " ".join(f'"{text[i : i + 255]}"' for i in range(0, len(text), 255))


def _in(state: State, command: list[str], text: str | None = None) -> str:
    done = state.run_in(NAME, command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"foreign: {' '.join(command[:2])}: {done.stderr.strip()}")
    return str(done.stdout)


def send(state: State, *, sender: str, to: str, subject: str, text: str = "") -> str:
    """Hands a mail to the foreign host's own queue, which finds the way by MX. Returns its Message-ID."""
    message_id = f"<{secrets.token_hex(8)}@far.example>"
    body = text or f"A mail that nobody wrote before: {secrets.token_hex(8)}.\n"
    mail = (
        f"From: Bob <{sender}>\nTo: <{to}>\nSubject: {subject}\nMessage-ID: {message_id}\n"
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S +0000', time.gmtime())}\n"
        f"MIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n\n{body}"
    )
    _in(state, ["sendmail", "-f", sender, to], mail)
    return message_id


def mails(state: State) -> Iterator[str]:
    """Every mail in the mailbox of bob@far.example."""
    folder = upper(state, NAME) / MAILBOX.lstrip("/")
    for part in ("new", "cur"):
        for file in sorted((folder / part).glob("*")) if (folder / part).exists() else ():
            yield file.read_text(errors="replace")


def wait_for(state: State, message_id: str, seconds: float) -> str | None:
    """The mail with a Message-ID, waited for; None when it did not come in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for mail in mails(state):
            if message_id in mail.partition("\n\n")[0]:
                return mail
        time.sleep(POLL_SECONDS)
    return None
