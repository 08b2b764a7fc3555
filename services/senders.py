"""Who may write as whom: for the envelope, which Postfix looks at, and for the From header, which rspamd does."""

from __future__ import annotations

from collections.abc import Mapping

from model.stack import Stack


def authors(stack: Stack) -> Mapping[str, str]:
    """User to the addresses that they may write as; a whole domain begins with an @."""
    owned = {account: sorted(set(stack.addresses_of(account))) for account in stack.accounts}
    for user, settings in stack.machine_users.items():
        # A host writes as itself, cron as root at the host's own name, and never as one of the users.
        hosts = [f"@{stack.all_hosts[host].fqdn}" for host in settings.hosts]
        owned[user] = [settings.sender, *settings.send_as, *hosts]
    return {user: ",".join(addresses) for user, addresses in owned.items() if addresses}


def owners(stack: Stack) -> Mapping[str, str]:
    """Address (or @domain) to the users who may write as it: smtpd_sender_login_maps in postconf(5)."""
    found: dict[str, list[str]] = {}
    for user, addresses in authors(stack).items():
        for address in addresses.split(","):
            found.setdefault(address, []).append(user)
    # An address of its own line shuts out those who have the whole domain: they are named there too.
    return {
        address: ", ".join(sorted({*users, *found.get(f"@{address.partition('@')[2]}", [])}))
        for address, users in found.items()
    }
