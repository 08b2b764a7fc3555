"""What other domains demand of the TLS by which mail reaches them: MTA-STS, after DANE."""

from __future__ import annotations

from model.stack import Host, Stack
from services import identity
from services.render import render_tree
from services.service import Call, Service, Unit

PORT = 8461
TABLE = f"socketmap:inet:127.0.0.1:{PORT}:postfix"
"""Where Postfix asks: socketmap_table(5). Without an answer the mail is deferred."""
DAEMON = "/usr/local/lib/posthorn/tls-policy"
UNIT = "postfix-mta-sts-resolver.service"


def configure(stack: Stack, host: Host) -> Service:
    """Debian's postfix-mta-sts-resolver on loopback, kept from overriding DANE."""
    config, drop_in = "/etc/mta-sts-daemon.yml", f"/etc/systemd/system/{UNIT}.d/"
    return Service(
        name="tls-policy",
        packages=("postfix-mta-sts-resolver", "python3-dnspython"),
        files=render_tree(
            "tls-policy", modes={DAEMON: "0755"}, stack=stack, identity=identity, port=PORT, daemon=DAEMON
        ),
        calls=(Call(PORT, "postfix"),),
        units=(Unit(UNIT, restart_on=(config, drop_in, DAEMON, identity.PRIVATE_ROOTS)),),
    )
