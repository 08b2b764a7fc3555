"""A mail host of somebody else: mx.far.example. It checks SPF, DKIM and DMARC, and says what it found.

Nothing in it is shared with the hosts of the stack: where they filter with rspamd, it checks with OpenDKIM,
OpenDMARC and pyspf.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Iterator

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from lab import internet
from lab.containers import upper
from lab.network import FOREIGN, LAN4, LAN6
from lab.state import RESOLVER, LabError, State

NAME = "foreign"
HOST = "mx.far.example"
MAILBOX = "/home/bob/Maildir"
POLL_SECONDS = 0.1

MAIN_CF = f"""compatibility_level = 3.6
myhostname = {HOST}
mydomain = far.example
myorigin = far.example
mydestination = far.example
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
    permit_mynetworks, reject_unauth_destination, check_policy_service unix:private/policy-spf
policy-spf_time_limit = 60s
smtpd_milters = inet:127.0.0.1:8891, inet:127.0.0.1:8893
non_smtpd_milters = inet:127.0.0.1:8891
milter_default_action = tempfail
"""
MASTER_ADD = "policy-spf unix - n n - 0 spawn user=nobody argv=/usr/bin/policyd-spf\n"
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
SET_UP = r"""set -e
id bob >/dev/null 2>&1 || useradd --create-home --shell /usr/sbin/nologin bob
mkdir -p /etc/opendmarc && echo 127.0.0.1 > /etc/opendmarc/ignore.hosts
chown opendkim: /etc/opendkim/far.key && chmod 600 /etc/opendkim/far.key
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=mx.far.example -days 30 \
    -keyout /etc/postfix/tls.key -out /etc/postfix/tls.pem 2>/dev/null
cp /usr/share/postfix/master.cf.dist /etc/postfix/master.cf && cat /etc/postfix/master.add >> /etc/postfix/master.cf
# In the foreground: a PID file may come too late to be believed.
for milter in opendkim opendmarc; do
    mkdir -p /etc/systemd/system/$milter.service.d
    printf '[Service]\nType=simple\nPIDFile=\nExecStart=\nExecStart=/usr/sbin/%s -f\n' $milter \
        > /etc/systemd/system/$milter.service.d/lab.conf
done
systemctl daemon-reload
systemctl enable --quiet opendkim opendmarc postfix
systemctl restart opendkim opendmarc postfix
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
    internet.add_record(state, "far.example", "far._domainkey", "TXT", _txt(f"v=DKIM1; k=rsa; p={_b64(public)}"))
    for path, text in (
        ("/etc/postfix/main.cf", MAIN_CF),
        ("/etc/postfix/master.add", MASTER_ADD),
        ("/etc/postfix-policyd-spf-python/policyd-spf.conf", SPF_CONF),
        ("/etc/opendkim.conf", OPENDKIM_CONF),
        ("/etc/opendmarc.conf", OPENDMARC_CONF),
        ("/etc/opendkim/far.key", private),
    ):
        _in(state, ["install", "-D", "-m", "644", "/dev/stdin", path], text)
    _in(state, ["sh", "-c", SET_UP])
    done.touch()


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
