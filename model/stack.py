"""A whole stack: what the file says, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network

from pydantic import Field

from model.base import AccountName, DnsName, Frozen, HostName, IPAddress, IPNetwork, Label, to_unicode
from model.keys import Keys
from model.mail import CATCH_ALL, Account, Domain, MachineUser, Target
from model.network import Gateway, HostSettings, Release, Role, Site, mac_address
from model.settings import Access, Acme, Dkim, Dns, Filter, Limits, ServiceSettings


def family(addresses: tuple[IPAddress, ...], version: int) -> IPAddress | None:
    """The first address of an IP version (4 or 6), if there is one."""
    return next((address for address in addresses if address.version == version), None)


SESSION_MIB: Mapping[Release, float] = {12: 0.9, 13: 2.4}
"""Memory of an IMAP session with the Dovecot of a Debian release, its TLS included: measured (docs/capacity.md)."""
ROLE_MIB = 150
"""Memory of a mailbox host without any session, for each of its roles."""
FOR_MAIL = 0.9
"""The part of a machine's memory that services may take: the rest is for the kernel, and for what files it has read."""

WEB_LABELS = ("autoconfig", "autodiscover", "mta-sts")
"""Below each domain: where mail programs and other mail hosts ask for documents over HTTPS."""


class Host(HostSettings):
    """A host with all that its place in the stack says about it."""

    name: Label
    fqdn: DnsName
    """Its internal name: role.site.network-domain."""

    def has(self, role: Role | str) -> bool:
        return role in self.roles

    @property
    def local4(self) -> IPAddress | None:
        return family(self.addresses.local, 4)

    @property
    def local6(self) -> IPAddress | None:
        return family(self.addresses.local, 6)

    @property
    def public4(self) -> IPAddress | None:
        return family(self.addresses.public, 4)

    @property
    def public6(self) -> IPAddress | None:
        return family(self.addresses.public, 6)

    @property
    def management_address(self) -> IPAddress:
        """Where the operator reaches it over SSH."""
        return self.addresses.local[0]

    def mac(self, interface: int) -> str:
        return mac_address(self.name, interface)

    def host_key(self, keys: Keys) -> str:
        """The SSH host key that is pinned, as in authorized_keys; empty when there is none yet."""
        if self.existing:
            return self.existing.host_key
        public = keys.public.hosts.get(self.name)
        return public.ssh if public else ""


class StackFile(Frozen):
    """The configuration keys of a stack, one field a key."""

    service: ServiceSettings
    """What the service is called, and who answers for it."""
    sites: dict[Label, Site] = Field(min_length=1)
    """Site by name."""
    gateways: tuple[Gateway, ...] = ()
    """How the sites are seen outside."""
    hosts: dict[Label, HostSettings] = Field(min_length=1)
    """Host by name, which is role-site."""
    domains: dict[HostName, Domain] = Field(min_length=1)
    """Domain by name."""
    accounts: dict[AccountName, Account] = {}
    """Account by name, as ``ann`` or ``john.doe``. Users log in by it, or by an address that is theirs alone."""
    machine_users: dict[Label, MachineUser] = {}
    """Machine user by name."""
    access: Access
    """Who may reach what."""
    dns: Dns = Dns()
    """Records."""
    acme: Acme | None = None
    """Certificates that the world believes."""
    dkim: Dkim
    """Signing."""
    filter: Filter = Filter()
    """Spam."""
    limits: Limits = Limits()
    """Limits."""
    keys: Keys = Keys()
    """Made by ``make keys``, and not to be written by hand."""


class Stack(StackFile):
    """A stack whose file was read. Everything here is derived; nothing is typed twice."""

    name: str

    @cached_property
    def all_hosts(self) -> Mapping[str, Host]:
        return {
            name: Host(
                name=name,
                fqdn=f"{name.removesuffix('-' + host.site)}.{host.site}.{self.service.network_domain}",
                **dict(host),
            )
            for name, host in self.hosts.items()
        }

    def hosts_with(self, role: Role | str) -> tuple[Host, ...]:
        """All hosts of a role, by the preference of their sites: the first is the primary."""
        return tuple(host for host in self.all_hosts.values() if host.has(role))

    def local_addresses(self, *roles: Role) -> tuple[IPAddress, ...]:
        """The site-local addresses of all hosts of some roles."""
        return tuple(address for role in roles for host in self.hosts_with(role) for address in host.addresses.local)

    def hosts_at(self, site: str) -> tuple[Host, ...]:
        return tuple(host for host in self.all_hosts.values() if host.site == site)

    def site_of(self, host: Host) -> Site:
        return self.sites[host.site]

    def release_of(self, host: Host) -> Release:
        return host.release or self.service.release

    def sessions_that_fit(self, host: Host) -> int | None:
        """How many IMAP sessions the memory of a mailbox host carries: None where the stack does not say what it has.

        In hundreds, but for the smallest machines.
        """
        if host.machine is None:
            return None
        room = FOR_MAIL * host.machine.memory - ROLE_MIB * len(host.roles)
        fitting = int(room / SESSION_MIB[self.release_of(host)])
        return max(0, fitting - fitting % (100 if fitting >= 100 else 10))

    def imap_sessions_of(self, host: Host) -> int:
        """How many IMAP sessions a mailbox host allows."""
        if self.limits.imap_sessions is not None:
            return self.limits.imap_sessions
        fitting = self.sessions_that_fit(host)
        return 2000 if fitting is None else min(fitting, 10000)

    # Names

    @property
    def domain(self) -> str:
        return self.service.domain

    @property
    def net(self) -> str:
        return self.service.network_domain

    @property
    def own_domain(self) -> str:
        """The domain that the service itself writes from and signs for: its own, where that may send."""
        return self.domain if self.domain in self.sending_domains else self.sending_domains[0]

    def public_name(self, service: str) -> str:
        """The public name of smtp_in, smtp_out, imap, webmail or frontend."""
        return f"{getattr(self.service.names, service)}.{self.domain}"

    def internal_name(self, role: Role | str) -> str:
        """The internal name that stands for all hosts of a role."""
        return f"{Role(role).value}.{self.net}"

    @property
    def mailbox_domain(self) -> str:
        """The internal domain of all mailboxes: account@maildrop.network-domain."""
        return self.internal_name(Role.MAILDROP)

    def internal_names_of(self, host: Host) -> tuple[str, ...]:
        """The names by which the stack's own hosts know a host, its own first."""
        return tuple(dict.fromkeys((host.fqdn, *(self.internal_name(role) for role in host.roles))))

    def public_names_of(self, host: Host) -> tuple[str, ...]:
        """Every name by which the world reaches a host, directly or through the front ends.

        The front ends' own name too for what stands behind them: SRV records lead to it, so clients check it.
        """
        served = {
            Role.SMTP_IN: ("smtp_in",),
            Role.SMTP_OUT: ("smtp_out", "frontend"),
            Role.MAILDROP: ("imap", "frontend"),
            Role.FRONTEND: ("frontend", "webmail"),
        }
        names = [self.public_name(service) for role in host.roles for service in served.get(role, ())]
        if host.has(Role.FRONTEND):
            names += [f"{label}.{domain}" for domain in self.domains for label in WEB_LABELS]
        return tuple(dict.fromkeys(names))

    def acme_names(self, host: Host) -> tuple[str, ...]:
        """The names of a host that an ACME authority certifies: challenges are answered in zones that take updates."""
        if self.acme is None:
            return ()
        return tuple(n for n in self.public_names_of(host) if self.dns.zones.get(self.zone_of(n) or "") is not None)

    def acme_certificates(self, host: Host) -> Mapping[str, tuple[str, ...]]:
        """The public certificates of a host, each with its names: that of its services (""), and one for each domain.

        A domain that nobody can validate (it expired, it left) so fails alone, and no order has many names.
        """
        domains = {f"{label}.{domain}": domain for domain in self.domains for label in WEB_LABELS}
        found: dict[str, tuple[str, ...]] = {}
        for name in self.acme_names(host):
            of = domains.get(name, "")
            found[of] = (*found.get(of, ()), name)
        return found

    def zone_of(self, name: str) -> str | None:
        """The most specific zone of the stack that holds a name."""
        holding = [zone for zone in self.dns.zones if name == zone or name.endswith(f".{zone}")]
        return max(holding, key=len, default=None)

    def certificate_names(self, host: Host) -> tuple[str, ...]:
        """Every name that a host serves under, its own first: the subject alternative names of its certificate."""
        return tuple(dict.fromkeys((*self.internal_names_of(host), *self.public_names_of(host))))

    # Networks

    @property
    def local_prefixes(self) -> tuple[IPNetwork, ...]:
        """All site-local prefixes of all sites."""
        return tuple(prefix for site in self.sites.values() for prefix in site.local.prefixes)

    def leaves_from(self) -> tuple[IPAddress | IPNetwork, ...]:
        """Every address that mail can leave from: all gateways, and smtp-in, which forwards and bounces itself."""
        sources: list[IPAddress | IPNetwork] = []
        for gateway in self.gateways:
            sources.extend(gateway.prefixes or gateway.addresses)
        networks = [source for source in sources if isinstance(source, IPv4Network | IPv6Network)]
        for host in self.hosts_with(Role.SMTP_IN):
            sources.extend(
                a for a in host.addresses.public if not any(a in n for n in networks if n.version == a.version)
            )
        return tuple(dict.fromkeys(sources))

    # Mail

    def resolved_aliases(self, domain: str) -> Mapping[str, tuple[Target, ...]]:
        """The aliases of a domain, with those of the domain it equals, and with postmaster and abuse (RFC 2142)."""
        if domain not in self._aliases:
            settings = self.domains[domain]
            base = self.resolved_aliases(settings.same_as) if settings.same_as else {}
            required = dict.fromkeys(("postmaster", "abuse"), (self.service.postmaster,))
            self._aliases[domain] = {**required, **base, **settings.aliases}
        return self._aliases[domain]

    @cached_property
    def _aliases(self) -> dict[str, Mapping[str, tuple[Target, ...]]]:
        """Those that were asked for: a domain is asked once for each alias that leads there."""
        return {}

    def accepts(self, address: str) -> bool:
        """Whether an address in one of the stack's domains, or of a mailbox, leads anywhere."""
        local, _, domain = address.partition("@")
        if domain == self.mailbox_domain:
            return local.split("+")[0] in self.accounts
        if domain not in self.domains:
            return False
        aliases = self.resolved_aliases(domain)
        return local in aliases or local.split("+")[0] in aliases or CATCH_ALL in aliases

    def leaves(self, target: Target) -> bool:
        """Whether an alias's target, or one that it leads to in turn, is out of the stack."""
        local, _, domain = (target.address or "").partition("@")
        if not domain or domain == self.mailbox_domain:
            return False
        if domain not in self.domains:
            return True
        aliases = self.resolved_aliases(domain)
        found = aliases.get(local) or aliases.get(local.split("+")[0]) or aliases.get(CATCH_ALL, ())
        return any(self.leaves(further) for further in found)

    @cached_property
    def logins(self) -> Mapping[str, str]:
        """What users may log in by, each to its account: names, and addresses whose mail goes to one account alone.

        The account's name in a domain of the stack will do too, as users type it, unless that address is another's.
        An international domain is known by both its forms: mail programs are told to log in by the address as typed.
        """
        found = {account: account for account in self.accounts}
        for domain in self.domains:
            aliases = self.resolved_aliases(domain)
            for local in {*aliases, *self.accounts} - {CATCH_ALL}:
                targets = aliases.get(local, aliases.get(CATCH_ALL))
                owners = {target.account for target in targets} if targets else {local}
                owner = owners.pop() if len(owners) == 1 else None
                # What only the catch-all takes is nobody's own address.
                if owner is not None and (local in aliases or owner == local):
                    found |= {f"{local}@{form}": owner for form in (domain, to_unicode(domain))}
        return found

    @property
    def without_address(self) -> tuple[str, ...]:
        """Accounts that get no mail, since no alias leads to them."""
        targets = {t for domain in self.domains for found in self.resolved_aliases(domain).values() for t in found}
        mailbox = f"@{self.mailbox_domain}"
        reached = {t.account or str(t).removesuffix(mailbox).split("+")[0] for t in targets}
        return tuple(account for account in self.accounts if account not in reached)

    @property
    def postmaster_address(self) -> str:
        """The address of the postmaster, in a domain that takes mail."""
        return f"postmaster@{self.domain if self.domain in self.domains else next(iter(self.domains))}"

    @property
    def reports_to(self) -> str:
        """Who gets what others report about our mail."""
        return self.dns.reports or self.postmaster_address

    @property
    def sending_domains(self) -> tuple[str, ...]:
        return tuple(name for name, domain in self.domains.items() if domain.sends)

    def machine_user_of(self, host: Host) -> str:
        """The machine user of a host with the role relay-client."""
        return next(name for name, user in self.machine_users.items() if host.name in user.hosts)

    def primary_address(self, account: str) -> str:
        """The address that an account's filters write as: its own in the service's domain, else its first one."""
        addresses, own = list(self.addresses_of(account)), f"{account}@{self.domain}"
        return own if own in addresses else next(iter(addresses), self.postmaster_address)

    def addresses_of(self, account: str) -> Iterator[str]:
        """The addresses an account may send as: those that lead to it directly, and its ``send_as``."""
        yield from self._addresses.get(account, ())
        yield from self.accounts[account].send_as

    @cached_property
    def _addresses(self) -> Mapping[str, Sequence[str]]:
        """Accounts to the addresses that lead to them directly, in domains that send."""
        found: dict[str, list[str]] = {}
        for domain in self.sending_domains:
            for local, targets in self.resolved_aliases(domain).items():
                for account in {target.account for target in targets if target.account and local != CATCH_ALL}:
                    found.setdefault(account, []).append(f"{local}@{domain}")
        return found
