"""Replacing keys: a run takes one step, and ``make up`` brings it to name servers and hosts before the next.

Where others go by a key that they remember, the one to come is known before it is used, and the one before is forgotten
after it was: nobody is turned away in between. The Pulumi state tells whether ``make up`` was there.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from model.keys import HostPrivateKeys, HostPublicKeys, Keys, PrivateKeys, PublicKeys
from model.network import Role
from model.stack import Host, Stack
from ops.keys import new_authority, ssh_key, tls_key
from ops.pulumi import OperatorError
from services import identity, postsrsd
from services.zones import key_digest, tlsa_names

TTLS = 2
"""For how many TTLs others may still remember what stood in DNS before: a secondary server may be late by one."""

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Brought:
    """What ``make up`` has brought to name servers and hosts last: an exported Pulumi state."""

    state: Mapping[str, Any]

    def resource(self, name: str) -> Mapping[str, Any]:
        resources = (self.state.get("deployment") or {}).get("resources") or []
        return next((r for r in resources if r["urn"].rpartition("::")[2] == name and not r.get("delete")), {})

    def since(self, name: str, kind: str, record: str) -> dt.datetime | None:
        """Since when an RRset is as it is now, if it holds a record; None if it does not."""
        resource = self.resource(f"{name}-{kind}")
        if record not in resource.get("outputs", {}).get("records", ()):
            return None
        return dt.datetime.fromisoformat(resource["modified"])

    def bundle(self, host: Host) -> Mapping[str, Any]:
        """The bundle that a host has."""
        found: dict[str, Any] = json.loads(self.resource(f"{host.name}-files").get("inputs", {}).get("stdin", "{}"))
        return found

    def file(self, host: Host, path: str) -> str:
        """The text of a file on a host; empty if it has none."""
        return str(self.bundle(host).get("files", {}).get(path, {}).get("content", ""))

    def secret(self, host: Host, path: str) -> str:
        """The version of a secret on a host; empty if it has none."""
        return str(self.bundle(host).get("secrets", {}).get(path, {}).get("version", ""))


@dataclass(frozen=True)
class Step:
    """The keys after a step, what was done, and what is to be done next."""

    public: PublicKeys
    private: PrivateKeys
    done: str
    after: str


@dataclass(frozen=True)
class Roll:
    """One word of ROLL, and all that its steps go by."""

    word: str
    stack: Stack
    public: PublicKeys
    private: PrivateKeys
    brought: Brought
    now: dt.datetime

    @property
    def up(self) -> str:
        return f"make up STACK={self.stack.name}"

    @property
    def again(self) -> str:
        return f"make keys STACK={self.stack.name} ROLL={self.word}"

    def step(self, done: str, after: str, public: Changes | None = None, private: Changes | None = None) -> Step:
        """What this step makes of the keys."""
        return Step(
            self.public.model_copy(update=public or {}), self.private.model_copy(update=private or {}), done, after
        )

    def of_host(self, host: Host, public: HostPublicKeys, private: HostPrivateKeys, done: str, after: str) -> Step:
        """The same, where the keys of one host changed."""
        return self.step(
            done,
            after,
            {"hosts": {**self.public.hosts, host.name: public}},
            {"hosts": {**self.private.hosts, host.name: private}},
        )

    def wait_for(self, hosts: Iterable[Host], reached: Callable[[Host], bool], what: str) -> None:
        """Raises `OperatorError` while the step before has not reached some hosts."""
        if late := [host.name for host in hosts if not reached(host)]:
            raise self.refused(f"{', '.join(late)} {what}: {self.up} first")

    def refused(self, why: str) -> OperatorError:
        return OperatorError(f"ROLL={self.word}: {why}; nothing was changed")


# Keys of one host


def _tls(roll: Roll, host: Host) -> Step:
    """A host's TLS key is in TLSA before it serves, and for a while after that (RFC 7671 section 8.1).

    It comes to the host first, which has it certified (services/certificate.py).
    """
    public, private = roll.public.hosts[host.name], roll.private.hosts[host.name]
    names, key = tlsa_names(roll.stack, host), f"TLS key of {host.name}"
    if private.next:
        _next_is_there(roll, host, names)
        before = key_digest(x509.load_pem_x509_certificate(public.certificate.encode()).public_key()) if names else ""
        # Without a certificate: that is signed where keys are completed.
        public = HostPublicKeys(ssh=public.ssh, certificate="", previous=before)
        private = HostPrivateKeys(ssh=private.ssh, tls=private.next)
        after = f"{roll.up}, then {roll.again}: until then the one before stands in TLSA" if names else roll.up
        return roll.of_host(host, public, private, f"{key}: the next one is the one that serves", after)
    if public.previous:
        _certificate_is_there(roll, [host])
        public = public.model_copy(update={"previous": ""})
        return roll.of_host(host, public, private, f"{key}: the one before stands in TLSA no more", roll.up)
    following = tls_key()
    digest = key_digest(load_pem_private_key(following.encode(), None).public_key())
    wait = f", and {TTLS * roll.stack.dns.ttl.service} s later" if names else ", then"
    after = f"{roll.up}{wait} {roll.again}"
    if by_hand := [name for name in names if not _updated(roll.stack, name)]:
        after += f"; make up does not publish {', '.join(by_hand)}: count from when its TLSA records are there"
    public, private = public.model_copy(update={"next": digest}), private.model_copy(update={"next": following})
    return roll.of_host(host, public, private, f"{key}: the next one was made", after)


def _updated(stack: Stack, name: str) -> bool:
    """Whether ``make up`` publishes what stands at a name."""
    zone = stack.zone_of(name)
    return zone is not None and stack.dns.zones[zone] is not None


def _next_is_there(roll: Roll, host: Host, names: Iterable[str]) -> None:
    """Raises `OperatorError` while somebody may not know a host's next key yet: the host, or whoever remembers TLSA."""
    following = roll.private.hosts[host.name].next
    version = Keys(private=roll.private).version(following)
    roll.wait_for(
        [host],
        lambda host: roll.brought.secret(host, identity.NEXT_KEY) == version,
        "does not have its next key yet",
    )
    for name in (name for name in names if _updated(roll.stack, name)):
        since = roll.brought.since(name, "TLSA", f"3 1 1 {roll.public.hosts[host.name].next}")
        if since is None:
            raise roll.refused(f"{name} TLSA does not hold the next key yet: {roll.up} first")
        left = (since - roll.now).total_seconds() + TTLS * roll.stack.dns.ttl.service
        if left > 0:
            raise roll.refused(f"others may remember {name} TLSA without the next key for another {left:.0f} s")


def _certificate_is_there(roll: Roll, hosts: Iterable[Host]) -> None:
    """Raises `OperatorError` while some hosts do not serve the certificate that the stack has for them."""
    roll.wait_for(
        hosts,
        lambda host: roll.brought.file(host, identity.CERTIFICATE) == roll.public.hosts[host.name].certificate,
        "does not serve its new certificate yet",
    )


def _ssh(roll: Roll, host: Host) -> Step:
    """The key that a machine is known by comes with its first boot, so both are made anew together."""
    if host.machine is None:
        raise roll.refused(f"{host.name} is no machine of the stack: change its key on it, and existing.host_key here")
    shown, key = ssh_key(host.name)
    public = roll.public.hosts[host.name].model_copy(update={"ssh": shown})
    private = roll.private.hosts[host.name].model_copy(update={"ssh": key})
    disk = roll.brought.resource(f"{host.name}-system").get("urn", f"…::{host.name}-system")
    after = f"pulumi state taint '{disk}' --yes --stack {roll.stack.name}, then {roll.up}: that makes the machine anew"
    return roll.of_host(host, public, private, f"SSH host key of {host.name}: replaced", after)


def _tsig(roll: Roll, host: Host) -> Step:
    """Until both know it, the host cannot answer challenges: it tries again, and has weeks."""
    if host.fqdn not in roll.private.tsig:
        raise roll.refused(f"{host.name} has none: it asks no ACME authority")
    secret = base64.b64encode(secrets.token_bytes(32)).decode()
    after = f"{roll.up}, and tell the name server: make update-keys STACK={roll.stack.name}"
    return roll.step(
        f"TSIG key {host.fqdn}: replaced", after, private={"tsig": {**roll.private.tsig, host.fqdn: secret}}
    )


# Keys of the stack


def _authority(roll: Roll) -> Step:
    """All hosts believe the next authority before it signs, and the one before until nothing signed by it is served."""
    public, hosts = roll.public, roll.stack.all_hosts.values()
    if public.next_authority:
        roll.wait_for(
            hosts,
            lambda host: public.next_authority in roll.brought.file(host, identity.AUTHORITY),
            "does not believe the next one yet",
        )
        return roll.step(
            "authority: the next one signs, all certificates of hosts are its",
            f"{roll.up}, then {roll.again}: until then hosts believe the one before too",
            {"authority": public.next_authority, "next_authority": "", "previous_authority": public.authority},
            {"authority": roll.private.next_authority, "next_authority": ""},
        )
    if public.previous_authority:
        _certificate_is_there(roll, hosts)
        return roll.step("authority: hosts believe the one before no more", roll.up, {"previous_authority": ""})
    certificate, key = new_authority(roll.stack.domain)
    return roll.step(
        "authority: the next one was made, for hosts to believe",
        f"{roll.up}, then {roll.again}",
        {"next_authority": certificate},
        {"next_authority": key},
    )


def _srs(roll: Roll) -> Step:
    """All hosts know the next secret before it signs, and the one before while bounces may come to what it signed."""
    private, version = roll.private, Keys(private=roll.private).version(roll.private.srs_known)
    if private.next_srs:
        hosts = roll.stack.hosts_with(Role.SMTP_IN)
        roll.wait_for(
            hosts, lambda host: roll.brought.secret(host, postsrsd.SECRETS) == version, "has no next secret yet"
        )
        changes = {"srs": private.next_srs, "next_srs": "", "previous_srs": private.srs}
        after = f"{roll.up}; three weeks later {roll.again}: until then bounces to what the one before signed are known"
        return roll.step("SRS secret: the next one signs", after, private=changes)
    if private.previous_srs:
        return roll.step("SRS secret: the one before is known no more", roll.up, private={"previous_srs": ""})
    changes = {"next_srs": secrets.token_urlsafe(24)}
    return roll.step("SRS secret: the next one was made", f"{roll.up}, then {roll.again}", private=changes)


def _at_once(name: str, meanwhile: str) -> Callable[[Roll], Step]:
    """A secret that needs no steps: the new one is made where all keys are completed."""

    def replaced(roll: Roll) -> Step:
        return roll.step(f"{name} secret: replaced", f"{roll.up}: {meanwhile}", private={name: ""})

    return replaced


OF_HOST: Mapping[str, Callable[[Roll, Host], Step]] = {"tls": _tls, "ssh": _ssh, "tsig": _tsig}
OF_STACK: Mapping[str, Callable[[Roll], Step]] = {
    "authority": _authority,
    "srs": _srs,
    "session": _at_once("session", "all users of the webmail log in again"),
    "replication": _at_once("replication", "mailboxes are not replicated until both hosts have it"),
}


def roll(
    stack: Stack, words: Iterable[str], public: PublicKeys, private: PrivateKeys, state: Mapping[str, Any]
) -> tuple[PublicKeys, PrivateKeys, list[Step]]:
    """The next step of each word of ROLL. Raises `OperatorError` where one cannot be taken: then none is.

    What a step leaves empty is completed by `ops.keys.complete`.
    """
    steps: list[Step] = []
    now = dt.datetime.now(dt.UTC)
    for word in words:
        kind, _, name = word.partition("/")
        this = Roll(word, stack, public, private, Brought(state), now)
        if kind in OF_HOST and name in stack.all_hosts:
            if name not in private.hosts or name not in public.hosts:
                raise this.refused(f"{name} has no keys yet: make keys STACK={stack.name} makes them")
            step = OF_HOST[kind](this, stack.all_hosts[name])
        elif word in OF_STACK:
            step = OF_STACK[word](this)
        else:
            known = ", ".join((*(f"{kind}/HOST" for kind in OF_HOST), *OF_STACK))
            raise this.refused(f"what can be replaced is {known} (DKIM keys: docs/dns.md)")
        public, private = step.public, step.private
        steps.append(step)
    return public, private, steps
