"""One RRset on an authoritative server, kept by dynamic updates (RFC 2136) that are signed with TSIG (RFC 8945).

Every update carries prerequisites (RFC 2136 section 2.4), so that the server itself refuses it when the RRset is not
what the stack thinks it is: a record that somebody else changed is never silently overwritten. After every update the
provider looks whether the server has what was asked for: a server may answer NOERROR and do something else.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdataset
import dns.rdatatype
import dns.rdtypes
import dns.rrset
import dns.tsig
import dns.update
from pulumi import Input, ResourceOptions
from pulumi.dynamic import (
    CheckFailure,
    CheckResult,
    ConfigureRequest,
    CreateResult,
    DiffResult,
    ReadResult,
    Resource,
    ResourceProvider,
    UpdateResult,
)

VERSION = "3"
"""Raised when the provider's code changes what it does: the class is pickled by reference, so its code is no input."""

SECONDS = 10.0
TRIES = 4
SETTLE_SECONDS = 15.0
"""How long a server may take to show what it agreed to. One that forwards updates to its primary (RFC 2136 section 6)
has them later: BIND waits up to five seconds between two notifications of a zone."""
KEYS_PATH = "posthorn:keys"
IDENTITY = ("zone", "name", "type")
UNLIKE = (dns.rcode.NXRRSET, dns.rcode.YXRRSET, dns.rcode.NXDOMAIN, dns.rcode.YXDOMAIN)
"""Answers that a condition of an update does not hold (RFC 2136 section 2.2)."""

Properties = dict[str, Any]


class UpdateRefused(Exception):
    """The server did not do what was asked: which record, which server, what it said, and what to do."""


def tsig_secrets(keys: str) -> dict[str, str]:
    """TSIG key names and secrets, from the stack's configuration key that holds all keys."""
    private = json.loads(keys).get("private") or "{}"
    values = json.loads(private) if isinstance(private, str) else private
    found: dict[str, str] = values.get("tsig", {})
    return found


def rdatas(properties: Properties) -> dns.rrset.RRset:
    """The RRset that properties describe, in dnspython's form, which compares as DNS does.

    Raises `dns.exception.DNSException` where a record is not of its type.
    """
    name = dns.name.from_text(properties["name"])
    return dns.rrset.from_text(
        name, int(properties["ttl"]), dns.rdataclass.IN, properties["type"], *properties["records"]
    )


def same(one: Properties, other: Properties) -> bool:
    """Whether two sets of properties mean the same RRset, however they are written."""
    return rdatas(one) == rdatas(other) and int(one["ttl"]) == int(other["ttl"])


class RRsetProvider(ResourceProvider):
    """Creates, compares, changes and deletes one RRset. Holds no attribute when it is pickled: those would be state."""

    def configure(self, req: ConfigureRequest) -> None:
        """Takes the TSIG secrets from the configuration, where they arrive decrypted."""
        self._secrets = tsig_secrets(req.config.get(KEYS_PATH) or "{}")

    # What Pulumi asks

    def check(self, _olds: Properties, news: Properties) -> CheckResult:
        failures = []
        try:
            wanted = rdatas(news)
            zone = dns.name.from_text(news["zone"])
            if not wanted.name.is_subdomain(zone):
                failures.append(CheckFailure("name", f"{news['name']} is not in the zone {news['zone']}"))
            if wanted.name == zone and news["type"] in ("NS", "SOA"):
                failures.append(CheckFailure("type", f"the {news['type']} of a zone belongs to its operator"))
        except (dns.exception.DNSException, ValueError) as error:
            failures.append(CheckFailure("records", f"{news['name']} {news['type']}: {error}"))
        return CheckResult({**news, "provider_version": VERSION}, failures)

    def diff(self, _id: str, olds: Properties, news: Properties) -> DiffResult:
        replaces = [key for key in IDENTITY if str(olds.get(key)).lower() != str(news.get(key)).lower()]
        # A server that got another address or key is told again what it has: nothing is deleted for that.
        changed = bool(replaces) or not same(olds, news) or _way(olds) != _way(news)
        # A new RRset is created first: if the server refuses that, the old one still serves. A name that gets another
        # type has to be free before, since nothing stands beside a CNAME.
        delete_first = "type" in replaces
        return DiffResult(
            changes=changed, replaces=replaces, stables=list(IDENTITY), delete_before_replace=delete_first
        )

    def create(self, props: Properties) -> CreateResult:
        # The server is the judge of what is there: a look alone would take what a wildcard answers for a record.
        code = self._update(props, before=None)
        if code != dns.rcode.NOERROR:
            found = self._look(props)
            if found is None:
                raise UpdateRefused(self._company(props, code))
            if found != rdatas(props) and not props.get("adopt"):
                raise UpdateRefused(
                    f"{props['name']} {props['type']} is on {props['server']} already, and not made by this stack:"
                    f" {_shown(found)}. Remove it, or take it over: make up ADOPT={_identity(props)}"
                )
            code = self._update(props, before=found)
        self._confirm(props, code)
        return CreateResult(_identity(props), props)

    def update(self, _id: str, olds: Properties, news: Properties) -> UpdateResult:
        code = self._update(news, before=rdatas(olds))
        if code != dns.rcode.NOERROR and (news.get("adopt") or _place(olds) != _place(news)):
            # Another server may have nothing yet, or something of somebody else, as with a new RRset.
            self.create(news)
        else:
            self._confirm(news, code)
        return UpdateResult(news)

    def delete(self, _id: str, props: Properties) -> None:
        update, there = self._message(props), rdatas(props)
        _require(update, there)
        update.delete(there.name, there)
        code = self._send(props, update)
        if not self._stands(props):
            return
        what = f"{props['name']} {props['type']} on {props['server']}"
        if code == dns.rcode.NOERROR:
            raise UpdateRefused(
                f"{what} is still there, though the server agreed to delete it: look at the server's log"
            )
        found = self._look(props)
        raise UpdateRefused(
            f"{what} was changed by somebody else to {_shown(found)}: it is left alone. Run refresh to take that as"
            " known, then try again"
        )

    def read(self, id_: str, props: Properties) -> ReadResult:
        found = self._look(props)
        if _is(found, props):
            return ReadResult(id_, props)
        if found is None or not self._stands(props):
            return ReadResult(None, {})
        now = {**props, "ttl": found.ttl, "records": sorted(rdata.to_text() for rdata in found)}
        return ReadResult(id_, now)

    # What the server is told

    def _key(self, props: Properties) -> dns.tsig.Key | None:
        secret = getattr(self, "_secrets", {}).get(props["key_name"])
        return dns.tsig.Key(props["key_name"], secret, props["algorithm"]) if secret is not None else None

    def _message(self, props: Properties) -> dns.update.UpdateMessage:
        key = self._key(props)
        if key is None:
            raise UpdateRefused(f"the stack has no secret for the TSIG key {props['key_name']}: run make tsig")
        return dns.update.UpdateMessage(props["zone"], keyring=key)

    def _update(self, props: Properties, before: dns.rrset.RRset | None) -> dns.rcode.Rcode:
        """Asks for a change on condition that the server has what was there before. Returns its answer."""
        wanted = rdatas(props)
        update = self._message(props)
        if before is not None:
            _require(update, before)
        elif wanted.rdtype == dns.rdatatype.CNAME:
            # A server passes over a record beside a CNAME in silence (RFC 2136 section 3.4.2.2), so that is asked too.
            update.absent(wanted.name)
        else:
            update.absent(wanted.name, wanted.rdtype)
            update.absent(wanted.name, dns.rdatatype.CNAME)
        if wanted.rdtype == dns.rdatatype.CNAME:
            # It replaces the one that is there (section 3.4.2.2). Told to delete that first, Knot ends with none.
            update.add(wanted.name, wanted)
        else:
            update.replace(wanted.name, wanted)
        return self._send(props, update)

    def _confirm(self, props: Properties, code: dns.rcode.Rcode) -> None:
        """Makes sure that the server has the RRset as wanted, TTL included, whatever it answered to the update.

        Where it refused, that is well too: the answer to a first try may have been lost. Raises `UpdateRefused` with
        what the server has.
        """
        deadline = time.monotonic() + (SETTLE_SECONDS if code == dns.rcode.NOERROR else 0)
        found = self._look(props)
        while not _is(found, props) and time.monotonic() < deadline:
            time.sleep(0.1)
            found = self._look(props)
        if _is(found, props):
            return
        if code == dns.rcode.NOERROR:
            raise UpdateRefused(
                f"{props['server']} agreed to change {props['name']} {props['type']} to {_shown(rdatas(props))}, but"
                f" has {_shown(found)}. Look at the server's log and at its limits of TTLs, then run refresh and up"
            )
        raise UpdateRefused(
            f"{props['name']} {props['type']} on {props['server']} was changed by somebody else: the server has"
            f" {_shown(found)}. Run refresh, look at it, then up ({dns.rcode.to_text(code)})"
        )

    def _stands(self, props: Properties) -> bool:
        """Whether the zone has an RRset of this name and type. Asked by a condition of an update that changes nothing:
        a query would be answered from a wildcard, or from a zone below that the same server has."""
        update = self._message(props)
        update.absent(props["name"], props["type"])
        return self._send(props, update) == dns.rcode.YXRRSET

    def _company(self, props: Properties, code: dns.rcode.Rcode) -> str:
        """A sentence about what stands at a name that should be free."""
        kinds = ("A", "AAAA", "MX", "TXT", "SRV") if props["type"] == "CNAME" else ("CNAME",)
        there = [f"{kind} {_shown(found)}" for kind in kinds if (found := self._look({**props, "type": kind}))]
        return (
            f"{props['name']} {props['type']} cannot stand beside what is at this name on {props['server']}:"
            f" {'; '.join(there) or dns.rcode.to_text(code)}. Remove that first, with a make up of its own"
        )

    def _look(self, props: Properties) -> dns.rrset.RRset | None:
        """The RRset as the server itself has it now."""
        query = dns.message.make_query(props["name"], props["type"], flags=0)
        if key := self._key(props):
            # A server may have another view, or nothing at all, for whoever does not show a key.
            query.use_tsig(key)
        answer = self._exchange(props, query)
        if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise UpdateRefused(f"{props['server']} answers {dns.rcode.to_text(answer.rcode())} for {props['name']}")
        return answer.get_rrset(
            dns.message.ANSWER,
            dns.name.from_text(props["name"]),
            dns.rdataclass.IN,
            dns.rdatatype.from_text(props["type"]),
        )

    def _send(self, props: Properties, update: dns.update.UpdateMessage) -> dns.rcode.Rcode:
        """Sends an update. Returns NOERROR, or which condition did not hold; raises `UpdateRefused` for all else."""
        code = self._exchange(props, update).rcode()
        if code == dns.rcode.NOERROR or code in UNLIKE:
            return code
        raise UpdateRefused(
            f"{props['server']} refuses to change {props['name']} {props['type']} in {props['zone']}:"
            f" {dns.rcode.to_text(code)}. Is the key {props['key_name']} allowed to?"
        )

    def _exchange(self, props: Properties, message: dns.message.Message) -> dns.message.Message:
        """One exchange over TCP; a server that is busy with the zone is asked again, a little later each time."""
        error: Exception | None = None
        for attempt in range(TRIES):
            try:
                answer = dns.query.tcp(message, props["server"], port=int(props["port"]), timeout=SECONDS)
            except dns.tsig.PeerError as refused:
                raise UpdateRefused(
                    f"{props['server']} does not accept the TSIG key {props['key_name']}: {type(refused).__name__}"
                ) from None
            except (OSError, dns.exception.DNSException) as failed:
                error = failed
            else:
                if answer.rcode() != dns.rcode.SERVFAIL:
                    return answer
                error = None
            if attempt < TRIES - 1:
                time.sleep(random.uniform(0.1, 0.3) * 2**attempt)
        if error is None:
            return answer
        if isinstance(error, dns.exception.FormError):
            # As Knot answers for a zone that it does not have.
            raise UpdateRefused(
                f"{props['server']} answers for {props['name']}, but not signed with the key {props['key_name']}"
                f" ({error}). Does it have the zone {props['zone']}, and the key?"
            )
        raise UpdateRefused(
            f"{props['server']} port {int(props['port'])} does not answer for {props['name']}:"
            f" {error or type(error).__name__}"
        )


def _require(update: dns.update.UpdateMessage, before: dns.rrset.RRset) -> None:
    """Makes an update conditional on an RRset being exactly so. Its TTL has to be zero (RFC 2136 section 2.4.2)."""
    update.present(before.name, dns.rdataset.from_rdata_list(0, list(before)))


def _identity(props: Properties) -> str:
    return f"{props['name']}/{props['type']}"


def _place(props: Properties) -> tuple[str, int]:
    return props["server"], int(props["port"])


def _way(props: Properties) -> tuple[str, int, str, str]:
    return *_place(props), props["key_name"], props["algorithm"]


def _is(found: dns.rrset.RRset | None, props: Properties) -> bool:
    """Whether an RRset is the one that properties describe, TTL included."""
    wanted = rdatas(props)
    return found is not None and found == wanted and found.ttl == wanted.ttl


def _shown(found: dns.rrset.RRset | None) -> str:
    if found is None:
        return "nothing"
    return f"{found.ttl} " + ", ".join(sorted(rdata.to_text() for rdata in found))


class RRset(Resource, module="dns", name="RRset"):
    """An RRset (RFC 2181 section 5): all records of one name and type."""

    def __init__(
        self,
        resource_name: str,
        *,
        server: str,
        port: int,
        zone: str,
        name: str,
        type: str,  # noqa: A002 (the field's own word)
        ttl: int,
        records: list[str],
        key_name: str,
        algorithm: str,
        adopt: Input[bool] = False,
        opts: ResourceOptions | None = None,
    ) -> None:
        """Publishes ``records`` (in presentation format). ``adopt`` takes over an RRset that is there already."""
        properties = {
            "server": server,
            "port": port,
            "zone": zone,
            "name": name,
            "type": type,
            "ttl": ttl,
            "records": records,
            "key_name": key_name,
            "algorithm": algorithm,
            "adopt": adopt,
        }
        super().__init__(RRsetProvider(), resource_name, properties, opts)
