"""What mail programs and other mail hosts look up over HTTPS: settings for users, and the MTA-STS policy.

Settings are asked for by Thunderbird's autoconfig and by Outlook's autodiscover. They are the same for every user: a
name with its domain logs in as the account of that name.
"""

from __future__ import annotations

from model.stack import WEB_LABELS, Host, Stack
from services import identity, mta_sts
from services.render import render_tree
from services.service import Service

ROOT = "/usr/local/share/posthorn"
DOCUMENTS = (
    ("autoconfig", "/mail/config-v1.1.xml", "application/xml"),
    ("autodiscover", "/autodiscover/autodiscover.xml", "application/xml"),
    ("mta-sts", "/.well-known/mta-sts.txt", "text/plain"),
)
"""Label below each domain, path, and media type."""


def configure(stack: Stack, host: Host) -> Service:
    """Documents of the front end, under names of their own below every domain."""
    return Service(
        name="discovery",
        files=render_tree(
            "discovery",
            release=stack.release_of(host),
            stack=stack,
            root=ROOT,
            documents=DOCUMENTS,
            domains={domain: [f"{label}.{domain}" for label in WEB_LABELS] for domain in stack.domains},
            certified=stack.acme_certificates(host),
            public=identity.public,
            imap=stack.public_name("imap"),
            submission=stack.public_name("smtp_out"),
            policy=mta_sts.policy(stack),
        ),
    )
