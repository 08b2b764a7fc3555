"""What has to hold between the parts of a stack. Each check yields every problem it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

from model.base import IPAddress, Problem
from model.mail import Target
from model.network import Network, Role
from model.stack import SESSION_MIB, Stack

Check = Callable[[Stack], Iterator[Problem]]
FEWEST_SESSIONS = 50


def hosts_are_at_known_sites(stack: Stack) -> Iterator[Problem]:
    for name, host in stack.hosts.items():
        if host.site not in stack.sites:
            yield Problem(f"hosts.{name}.site", f"there is no site {host.site} (sites: {', '.join(stack.sites)})")
        elif not name.endswith(f"-{host.site}"):
            yield Problem(f"hosts.{name}", f"a host is named role-site: its name must end in -{host.site}")


def preference_names_all_sites(stack: Stack) -> Iterator[Problem]:
    named = stack.service.preference
    for index, site in enumerate(named):
        if site not in stack.sites:
            yield Problem(f"service.preference[{index}]", f"there is no site {site} (sites: {', '.join(stack.sites)})")
        elif site in named[:index]:
            yield Problem(f"service.preference[{index}]", f"{site} stands twice")
    if missing := [site for site in stack.sites if site not in named]:
        yield Problem("service.preference", f"does not name {', '.join(missing)}: every site has its place")


def machines_are_clear(stack: Stack) -> Iterator[Problem]:
    for name, host in stack.hosts.items():
        if host.site not in stack.sites:
            continue
        hypervisor = stack.sites[host.site].hypervisor
        if (host.machine is None) == (host.existing is None):
            yield Problem(f"hosts.{name}", "say either machine (a VM that the stack makes) or existing, one of them")
        elif host.machine and not hypervisor:
            yield Problem(f"hosts.{name}.machine", f"site {host.site} has no hypervisor to make it on")
        elif host.machine and hypervisor and stack.release_of(stack.all_hosts[name]) not in hypervisor.images:
            release = stack.release_of(stack.all_hosts[name])
            yield Problem(f"sites.{host.site}.hypervisor.images", f"no image of Debian {release}, which {name} needs")


def _outside(addresses: tuple[IPAddress, ...], network: Network | None) -> Iterator[tuple[int, IPAddress]]:
    for index, address in enumerate(addresses):
        if network is None or not any(address in prefix for prefix in network.prefixes):
            yield index, address


def addresses_are_inside_their_prefix(stack: Stack) -> Iterator[Problem]:
    for name, host in stack.hosts.items():
        site = stack.sites.get(host.site)
        if site is None:
            continue
        for kind, network in (("local", site.local), ("public", site.public)):
            prefixes = ", ".join(map(str, network.prefixes)) if network else "it has none"
            for index, address in _outside(getattr(host.addresses, kind), network):
                yield Problem(
                    f"hosts.{name}.addresses.{kind}[{index}]",
                    f"{address} is not in a {kind} prefix of site {host.site} ({prefixes})",
                )
            versions = [address.version for address in getattr(host.addresses, kind)]
            if len(versions) != len(set(versions)):
                yield Problem(f"hosts.{name}.addresses.{kind}", "at most one address of each family")


def gateways_are_reached(stack: Stack) -> Iterator[Problem]:
    for name, site in stack.sites.items():
        for kind, network in (("local", site.local), ("public", site.public)):
            if network is None:
                continue
            path, prefixes = f"sites.{name}.{kind}.gateways", ", ".join(map(str, network.prefixes))
            for index, gateway in _outside(network.gateways, network):
                # A router may be known by its link-local address alone (RFC 4861 section 6.1.2).
                if not gateway.is_link_local:
                    yield Problem(f"{path}[{index}]", f"{gateway} is in no {kind} prefix of site {name} ({prefixes})")
            versions = [gateway.version for gateway in network.gateways]
            if len(versions) != len(set(versions)):
                yield Problem(path, "at most one gateway of each family: hosts would get two default routes")


def public_addresses_have_a_way(stack: Stack) -> Iterator[Problem]:
    public = [host for host in stack.all_hosts.values() if host.machine and host.addresses.public]
    for host in public:
        if host.machine and host.machine.interfaces < 2:
            message = "its public addresses need the second interface: say 2, or leave it out"
            yield Problem(f"hosts.{host.name}.machine.interfaces", message)
    for index, network in enumerate(stack.access.ssh_from):
        if network.prefixlen == 0 and public:
            message = f"{network} is everywhere: name the networks that operators come from, since hosts with public"
            yield Problem(
                f"access.ssh_from[{index}]", f"{message} addresses route what is said here to their local side"
            )


def addresses_are_unique(stack: Stack) -> Iterator[Problem]:
    seen: dict[IPAddress, str] = {}
    for site_name, site in stack.sites.items():
        for kind, network in (("local", site.local), ("public", site.public)):
            for gateway in network.gateways if network else ():
                seen.setdefault(gateway, f"sites.{site_name}.{kind}.gateways")
    for index, named in enumerate(stack.gateways):
        for address in named.addresses:
            seen.setdefault(address, f"gateways[{index}]")
    for name, host in stack.hosts.items():
        for kind in ("local", "public"):
            for index, address in enumerate(getattr(host.addresses, kind)):
                path = f"hosts.{name}.addresses.{kind}[{index}]"
                if address in seen:
                    yield Problem(path, f"{address} is taken already by {seen[address]}")
                seen.setdefault(address, path)


def operators_reach_every_host(stack: Stack) -> Iterator[Problem]:
    for version in (4, 6):
        hosts = [host.name for host in stack.all_hosts.values() if host.management_address.version == version]
        if hosts and not any(network.version == version for network in stack.access.ssh_from):
            message = f"names no network of IPv{version}, over which {', '.join(hosts)} would be reached: add yours"
            yield Problem("access.ssh_from", f"{message}, or put their local address of the other family first")


def prefixes_do_not_overlap(stack: Stack) -> Iterator[Problem]:
    for (one, first), (other, second) in combinations(stack.sites.items(), 2):
        for a in first.local.prefixes:
            for b in second.local.prefixes:
                if a.version == b.version and a.overlaps(b):
                    yield Problem(f"sites.{other}.local.prefixes", f"{b} overlaps {a} of site {one}")


def roles_are_placed(stack: Stack) -> Iterator[Problem]:
    for role in (Role.SMTP_IN, Role.SMTP_OUT, Role.MAILDROP, Role.FRONTEND, Role.RSPAMD):
        if not stack.hosts_with(role):
            yield Problem("hosts", f"no host has the role {role.value}, which the service cannot do without")
    for role in (Role.SMTP_IN, Role.FRONTEND):
        for host in stack.hosts_with(role):
            if not host.addresses.public:
                yield Problem(f"hosts.{host.name}.addresses.public", f"{role.value} serves the internet: it needs one")
    if len(stack.hosts_with(Role.MAILDROP)) > 2:
        yield Problem("hosts", "at most two hosts have the role maildrop: they replicate with one another, in a pair")
    for name, settings in stack.hosts.items():
        if Role.WEBMAIL in settings.roles and Role.FRONTEND not in settings.roles:
            yield Problem(f"hosts.{name}.roles", "webmail is served by the NGINX of a front end: add the role frontend")
    if stack.hosts_with(Role.WEBMAIL) and not stack.access.users_from:
        yield Problem("access.users_from", "names no network: then nobody gets to the web mail")


def sessions_have_memory(stack: Stack) -> Iterator[Problem]:
    for host in stack.hosts_with(Role.MAILDROP):
        fitting = stack.sessions_that_fit(host)
        if host.machine is None or fitting is None:
            continue
        each = f"{SESSION_MIB[stack.release_of(host)]} MiB each with Debian {stack.release_of(host)}"
        wanted = stack.limits.imap_sessions
        if wanted is not None and wanted > fitting:
            yield Problem(
                "limits.imap_sessions",
                f"{wanted} sessions take {each}, and the {host.machine.memory} MiB of {host.name} carry {fitting}:"
                " leave the key out, and each mailbox host allows as many as it carries, or give it more memory",
            )
        elif fitting < FEWEST_SESSIONS:
            yield Problem(
                f"hosts.{host.name}.machine.memory",
                f"{host.machine.memory} MiB carry {fitting} IMAP sessions, {each}: too few for a mailbox host"
                f" (at least {FEWEST_SESSIONS})",
            )


MTA = "Debian's one mail transport agent"
HAS_ALONE: dict[Role, tuple[str, ...]] = {
    Role.SMTP_IN: (MTA, "rspamd", "port 25", "port 465"),
    Role.SMTP_OUT: (MTA, "rspamd", "Dovecot", "port 587"),
    Role.MAILDROP: (MTA, "Dovecot", "port 25", "port 465", "port 993", "port 4190"),
    Role.FRONTEND: ("NGINX", "port 80", "port 443", "port 465", "port 587", "port 993", "port 4190"),
    Role.RSPAMD: ("rspamd",),
    Role.RESOLVER: (),
    Role.WEBMAIL: (),
    Role.RELAY_CLIENT: (MTA,),
}
"""What a role takes of its host for itself: daemons, of which it sets up all, and ports that others may want."""


def roles_can_share_a_host(stack: Stack) -> Iterator[Problem]:
    for name, settings in stack.hosts.items():
        for one, other in combinations([role for role in Role if role in settings.roles], 2):
            if both := [thing for thing in HAS_ALONE[one] if thing in HAS_ALONE[other]]:
                pair = f"{one.value} and {other.value}"
                told = f"{pair} cannot share a host: each needs {_listed(both)} for itself, so give one of them another"
                yield Problem(f"hosts.{name}.roles", told)


def _listed(things: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(things[:-1]), things[-1])))


def targets_lead_somewhere(stack: Stack) -> Iterator[Problem]:
    def problem(target: Target) -> str | None:
        if target.account is not None and target.account not in stack.accounts:
            return f"there is no account {target.account}"
        if target.address:
            domain = target.address.split("@")[1]
            if (domain in stack.domains or domain == stack.mailbox_domain) and not stack.accepts(target.address):
                return f"{target} is in a domain of this stack, but no account, alias or catch-all takes it"
        return None

    for domain, settings in stack.domains.items():
        for local, targets in settings.aliases.items():
            for target in targets:
                if message := problem(target):
                    yield Problem(f"domains.{domain}.aliases.{local}", message)
            if len(targets) > 1 and any(target.discards for target in targets):
                yield Problem(f"domains.{domain}.aliases.{local}", "/dev/null beside other targets does nothing")
    if message := problem(stack.service.postmaster):
        yield Problem("service.postmaster", message)


def aliases_do_not_loop(stack: Stack) -> Iterator[Problem]:
    def next_addresses(address: str) -> list[str]:
        local, _, domain = address.partition("@")
        aliases = stack.resolved_aliases(domain) if domain in stack.domains else {}
        targets = aliases.get(local) or aliases.get(local.split("+")[0]) or aliases.get("*") or ()
        return [target.address for target in targets if target.address]

    def circle(path: tuple[str, ...]) -> tuple[str, ...]:
        for address in next_addresses(path[-1]):
            if address in path:
                return (*path, address)
            if found := circle((*path, address)):
                return found
        return ()

    for domain, settings in stack.domains.items():
        for local in settings.aliases:
            if found := circle((f"{local}@{domain}",)):
                yield Problem(f"domains.{domain}.aliases.{local}", f"leads in a circle: {' → '.join(found)}")
    # Every domain has a postmaster and an abuse that lead there, whether its aliases name them or not.
    postmaster = stack.service.postmaster.address
    if postmaster and (found := circle((postmaster,))):
        yield Problem("service.postmaster", f"leads in a circle: {' → '.join(found)}")


def equal_domains_exist(stack: Stack) -> Iterator[Problem]:
    for name, domain in stack.domains.items():
        if domain.same_as is None:
            continue
        other = stack.domains.get(domain.same_as)
        if other is None:
            yield Problem(f"domains.{name}.same_as", f"{domain.same_as} is not a domain of this stack")
        elif other.same_as is not None:
            yield Problem(
                f"domains.{name}.same_as", f"{domain.same_as} is itself the same as {other.same_as}: name that"
            )


def zones_have_servers(stack: Stack) -> Iterator[Problem]:
    for zone, server in stack.dns.zones.items():
        if server is not None and server not in stack.dns.servers:
            yield Problem(f"dns.zones.{zone}", f"there is no server {server} in dns.servers")
    advice = "name it, with null where you publish it yourself"
    for path, name in (("service.domain", stack.domain), ("service.network_domain", stack.net)):
        if not stack.zone_of(name):
            yield Problem("dns.zones", f"no zone holds {name} ({path}): {advice}")
    for domain in stack.domains:
        if not stack.zone_of(domain):
            yield Problem("dns.zones", f"no zone holds {domain} (domains): {advice}")
    for index, name in enumerate(stack.dns.silent):
        if name in stack.domains:
            yield Problem(f"dns.silent[{index}]", f"{name} is a domain that takes mail: say sends: false there instead")
        if not stack.zone_of(name):
            yield Problem(f"dns.silent[{index}]", f"no zone of dns.zones holds {name}")


def the_world_can_verify_what_is_demanded(stack: Stack) -> Iterator[Problem]:
    if stack.acme is None and stack.dns.mta_sts == "enforce":
        message = "senders verify the MX against public authorities: name an acme.directory, or say testing"
        yield Problem("dns.mta_sts", message)


def challenges_can_be_answered(stack: Stack) -> Iterator[Problem]:
    if stack.acme and not any(stack.acme_names(host) for host in stack.all_hosts.values()):
        yield Problem(
            "acme", "no public name is in a zone with a server (dns.zones): nobody could answer its challenges"
        )


def the_service_can_write(stack: Stack) -> Iterator[Problem]:
    if not stack.sending_domains:
        message = (
            "none of them sends: bounces and forwarded mail need one to leave from, so leave sends: false out of one"
        )
        yield Problem("domains", message)


def senders_have_a_place(stack: Stack) -> Iterator[Problem]:
    for kind, senders in (("accounts", stack.accounts), ("machine_users", stack.machine_users)):
        for name, sender in senders.items():
            for index, address in enumerate(sender.send_as):
                if address.split("@")[1] not in stack.sending_domains:
                    yield Problem(f"{kind}.{name}.send_as[{index}]", f"{address} is not in a domain that sends mail")
    for name, user in stack.machine_users.items():
        if name in stack.accounts:
            yield Problem(f"machine_users.{name}", "an account has this name already")
        if user.mail_from not in stack.sending_domains:
            yield Problem(f"machine_users.{name}.mail_from", f"{user.mail_from} is not a domain that sends mail")
        for host in user.hosts:
            if host not in stack.hosts:
                yield Problem(f"machine_users.{name}.hosts", f"there is no host {host}")


def relay_clients_have_a_user(stack: Stack) -> Iterator[Problem]:
    named = [(host, user) for user, settings in stack.machine_users.items() for host in settings.hosts]
    for name, settings in stack.hosts.items():
        users = [user for host, user in named if host == name]
        path, relays = f"hosts.{name}.roles", Role.RELAY_CLIENT in settings.roles
        if relays and not users:
            yield Problem(path, f"relay-client needs a user: name {name} in machine_users.<user>.hosts")
        elif relays and len(users) > 1:
            yield Problem(path, f"relay-client needs one user, and {' and '.join(users)} name {name}")
        elif users and not relays:
            yield Problem(f"machine_users.{users[0]}.hosts", f"{name} has not the role relay-client")


def scores_rise(stack: Stack) -> Iterator[Problem]:
    scores = stack.filter.scores
    if not scores.greylist <= scores.tag <= scores.reject:
        told = f"greylist {scores.greylist}, tag {scores.tag}, reject {scores.reject}"
        yield Problem("filter.scores", f"{told}: none of them may be above the next")
    if scores.reject <= 0:
        yield Problem("filter.scores.reject", "must be above 0, the score of a mail with nothing to be said against it")


def machines_start_with_a_resolver(stack: Stack) -> Iterator[Problem]:
    if not stack.dns.resolver.bootstrap and any(host.machine for host in stack.all_hosts.values()):
        message = "names no resolver, and VMs need one to install packages with: write the address of one they reach"
        yield Problem("dns.resolver.bootstrap", message)


def lists_are_clear(stack: Stack) -> Iterator[Problem]:
    allow, deny = stack.filter.allow, stack.filter.deny
    for kind in ("clients", "senders"):
        for index, one in enumerate(getattr(deny, kind)):
            if one in getattr(allow, kind):
                yield Problem(f"filter.deny.{kind}[{index}]", f"{one} stands under filter.allow too")
    for path, senders in (("allow", allow.senders), ("deny", deny.senders)):
        for index, sender in enumerate(senders):
            domain = sender.rpartition("@")[2]
            if own := [own for own in stack.domains if own == domain or own.endswith(f".{sender}")]:
                advice = f"{own[0]} is a domain of this stack: who writes as it logs in, or is looked at as all others"
                yield Problem(f"filter.{path}.senders[{index}]", advice)


def gateways_cover_senders(stack: Stack) -> Iterator[Problem]:
    if not stack.gateways:
        yield Problem("gateways", "none named: SPF has to list the addresses that smtp-out is seen by")


CHECKS: tuple[Check, ...] = (
    preference_names_all_sites,
    hosts_are_at_known_sites,
    machines_are_clear,
    addresses_are_inside_their_prefix,
    gateways_are_reached,
    public_addresses_have_a_way,
    addresses_are_unique,
    operators_reach_every_host,
    prefixes_do_not_overlap,
    roles_are_placed,
    roles_can_share_a_host,
    sessions_have_memory,
    equal_domains_exist,
    zones_have_servers,
    the_world_can_verify_what_is_demanded,
    challenges_can_be_answered,
    the_service_can_write,
    senders_have_a_place,
    relay_clients_have_a_user,
    gateways_cover_senders,
    scores_rise,
    machines_start_with_a_resolver,
    lists_are_clear,
)
"""In this order: a check may rely on those before it only to be silent, never to be right."""

AFTER_EQUAL_DOMAINS: tuple[Check, ...] = (targets_lead_somewhere, aliases_do_not_loop)
"""These follow ``same_as``, so they run only when that is sound."""


def all_problems(stack: Stack) -> list[Problem]:
    """Every problem between the parts of a stack, sorted by path."""
    problems = [problem for check in CHECKS for problem in check(stack)]
    if not any(problem.path.endswith(".same_as") for problem in problems):
        problems += [problem for check in AFTER_EQUAL_DOMAINS for problem in check(stack)]
    return sorted(problems)


def missing_keys(stack: Stack) -> list[Problem]:
    """What ``make keys`` has not made yet, of what stands in clear. Checked before a push, not before rendering."""
    public, advice = stack.keys.public, f"is missing: run make keys STACK={stack.name}"
    problems = [] if public.authority else [Problem("keys.public.authority", advice)]
    for name, host in stack.all_hosts.items():
        host_keys = public.hosts.get(name)
        if not host_keys or not host_keys.certificate or (host.machine is not None and not host_keys.ssh):
            problems.append(Problem(f"keys.public.hosts.{name}", advice))
    if not public.rspamd:
        problems.append(Problem("keys.public.rspamd", advice))
    for domain in stack.sending_domains:
        for selector in {stack.dkim.selector, *stack.dkim.published}:
            if not public.dkim.get(domain, {}).get(selector):
                problems.append(Problem(f"keys.public.dkim.{domain}.{selector}", advice))
    if not stack.access.operators:
        problems.append(Problem("access.operators", "no SSH public key of an operator: nobody could log in"))
    return sorted(problems)


def missing_secrets(stack: Stack) -> list[Problem]:
    """Private halves that a push needs: without one, a placeholder would be pushed in its place.

    Only the program that pushes can tell, since it has them decrypted.
    """
    private, advice = stack.keys.private, f"is missing: run make keys STACK={stack.name}"
    if private is None:
        lost = f"is missing: take it from an earlier commit, or run make keys STACK={stack.name}, which makes new keys"
        return [Problem("keys.private", lost)]
    names = ("rspamd", "srs", "session", "replication", "version_key")
    problems = [Problem(f"keys.private.{name}", advice) for name in names if not getattr(private, name)]
    for host in stack.all_hosts.values():
        pair = private.hosts.get(host.name)
        if pair is None or not pair.tls or (host.machine is not None and not pair.ssh):
            problems.append(Problem(f"keys.private.hosts.{host.name}", advice))
        if stack.acme_names(host) and host.fqdn not in private.tsig:
            problems.append(Problem(f"keys.private.tsig.{host.fqdn}", advice))
    for domain in stack.sending_domains:
        if not private.dkim.get(domain, {}).get(stack.dkim.selector):
            problems.append(Problem(f"keys.private.dkim.{domain}.{stack.dkim.selector}", advice))
    for name, server in stack.dns.servers.items():
        if server.key not in private.tsig:
            message = f"no secret for {server.key}: run make tsig STACK={stack.name} KEY={server.key}"
            problems.append(Problem(f"dns.servers.{name}.key", message))
    return sorted(problems)
