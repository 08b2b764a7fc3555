"""The own mail of hosts without Postfix: OpenSMTPD hands what root, cron and daemons write to smtp-out."""

from __future__ import annotations

from model.network import Role
from model.stack import Host, Stack
from services import identity, smtp_out
from services.render import render_tree
from services.service import Check, Directory, Sandbox, SecretFile, Service, Unit

SECRETS = "/etc/mail/secrets"
SPOOL = "/var/spool/smtpd"
LABEL = "stack"
"""Under which the password stands in the file of secrets (credentials in table(5))."""
UNIT = "opensmtpd.service"
DROP_IN = f"/etc/systemd/system/{UNIT}.d/"

SANDBOX = Sandbox(
    "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_KILL CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID CAP_SYS_CHROOT",
    # It takes up mail that was left while it was down by its sendmail, which is set-group-ID.
    set_id=True,
    asks_addresses=True,
)


def configure(stack: Stack, host: Host) -> Service:
    """OpenSMTPD on loopback, which relays through whichever smtp-out answers, as the machine user of the host."""
    name = stack.machine_user_of(host)
    user = stack.machine_users[name]
    return Service(
        name="relay-client",
        packages=("opensmtpd",),
        # Debian has one mail transport agent at a time.
        replaces=("postfix", "postfix-*", "exim4", "exim4-*"),
        files=render_tree(
            "relay-client",
            release=stack.release_of(host),
            stack=stack,
            host=host,
            identity=identity,
            secrets=SECRETS,
            spool=SPOOL,
            relay=f"smtp+tls://{LABEL}@{stack.internal_name(Role.SMTP_OUT)}:{smtp_out.SUBMISSION}",
            postmaster=stack.postmaster_address,
            sender=user.sender,
        ),
        # It makes these itself, but only after it has looked for them: its first start would complain.
        directories=(
            Directory("/etc/mail"),
            Directory(SPOOL, mode="0711"),
            Directory(f"{SPOOL}/purge", mode="0700", owner="opensmtpq"),
        ),
        secret_files=(
            SecretFile(
                SECRETS,
                "relay",
                f"{LABEL} {name}:{user.password.get_secret_value()}\n",
                mode="0640",
                group="opensmtpd",
            ),
        ),
        units=(
            Unit(
                UNIT,
                restart_on=("/etc/smtpd.conf", "/etc/mail/", "/etc/mailname", identity.AUTHORITY, DROP_IN),
                sandbox=SANDBOX,
            ),
        ),
        checks=(Check(("smtpd", "-n")),),
        health=(
            {
                "kind": "smtp",
                "address": "127.0.0.1",
                "port": 25,
                "tls": "none",
                "server_name": "localhost",
                "accepts": f"root@{host.fqdn}",
            },
        ),
    )
