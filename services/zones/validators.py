"""What makes a zone good: small functions, each with the document that asks for it, that yield every reason.

They look at what would be published, not at how it came about, so they hold whatever derives records.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import dns.exception
import dns.name
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.reversename

from model.base import Problem
from services.zones.rrset import STRING, RRset

Reason: TypeAlias = tuple[RRset, str]
SPF_LOOKUPS = 10
NAME_OCTETS, LABEL_OCTETS = 255, 63
TTL_MOST, TTL_SANE = 2**31 - 1, 7 * 86400
RDATA_OCTETS = 4096
"""A larger RRset is no use: with its signature it fits into no answer over UDP, and many servers refuse it."""


class Records:
    """All RRsets, to be asked by name."""

    def __init__(self, rrsets: Iterable[RRset]) -> None:
        self.all = tuple(rrsets)
        self.zones = {rrset.zone for rrset in self.all}
        self.by_name: dict[str, dict[str, list[RRset]]] = defaultdict(lambda: defaultdict(list))
        for rrset in self.all:
            self.by_name[rrset.name][rrset.type].append(rrset)

    def of_type(self, *kinds: str) -> Iterator[RRset]:
        return (rrset for rrset in self.all if rrset.type in kinds)

    def at(self, name: str, kind: str) -> list[str]:
        """The records of a type at a name."""
        found = self.by_name.get(name.rstrip(".").lower(), {}).get(kind, [])
        return [record for rrset in found for record in rrset.records]

    def ours(self, name: str) -> bool:
        """Whether a name is in a zone that is published from here: only then its absence is known."""
        bare = name.rstrip(".").lower()
        return any(bare == zone or bare.endswith(f".{zone}") for zone in self.zones)

    def texts(self, kind: str, start: str) -> Iterator[tuple[RRset, list[str]]]:
        """RRsets of TXT with those of their values that begin with a word, strings joined."""
        for rrset in self.of_type(kind):
            values = [value for value in map(joined, rrset.records) if value.lower().startswith(start)]
            if values:
                yield rrset, values


def joined(record: str) -> str:
    """A TXT record as its readers see it: all strings, joined without a space (RFC 7208 section 3.3)."""
    return "".join(re.sub(r"\\(.)", r"\1", string) for string in re.findall(r'"((?:[^"\\]|\\.)*)"', record))


Validator: TypeAlias = Callable[[Records], Iterator[Reason]]


def names_are_names(records: Records) -> Iterator[Reason]:
    """RFC 1035 section 2.3.4."""
    for rrset in records.all:
        labels = rrset.name.split(".")
        if any(not label for label in labels) or max(map(len, labels)) > LABEL_OCTETS:
            yield rrset, f"a label has 1 to {LABEL_OCTETS} octets (RFC 1035 section 2.3.4)"
        if sum(len(label) + 1 for label in labels) + 1 > NAME_OCTETS:
            yield rrset, f"the name is longer than {NAME_OCTETS} octets (RFC 1035 section 2.3.4)"


def names_are_in_their_zone(records: Records) -> Iterator[Reason]:
    """RFC 1034 section 4.2."""
    for rrset in records.all:
        if rrset.name != rrset.zone and not rrset.name.endswith(f".{rrset.zone}"):
            yield rrset, f"is not in the zone {rrset.zone} (RFC 1034 section 4.2)"


def the_apex_is_its_operators(records: Records) -> Iterator[Reason]:
    """RFC 1912 section 2.4; RFC 1034 section 4.2.1."""
    for rrset in records.all:
        if rrset.name == rrset.zone and rrset.type in ("SOA", "NS", "CNAME", "DNAME"):
            yield rrset, f"a {rrset.type} at the apex of a zone is not the stack's to publish (RFC 1034 section 4.2.1)"


def an_rrset_has_one_origin(records: Records) -> Iterator[Reason]:
    """RFC 2181 section 5: records of one name and type are one set."""
    for kinds in records.by_name.values():
        for found in kinds.values():
            for rrset in found[1:]:
                yield rrset, f"{found[0].path} publishes records of this name and type too (RFC 2181 section 5)"


def no_record_stands_twice(records: Records) -> Iterator[Reason]:
    """RFC 2181 section 5."""
    for rrset in records.all:
        for record in sorted({record for record in rrset.records if rrset.records.count(record) > 1}):
            yield rrset, f"{record} stands twice (RFC 2181 section 5)"


def nothing_stands_beside_a_cname(records: Records) -> Iterator[Reason]:
    """RFC 1034 section 3.6.2."""
    for kinds in records.by_name.values():
        if "CNAME" in kinds and len(kinds) > 1:
            others = ", ".join(sorted(set(kinds) - {"CNAME"}))
            yield kinds["CNAME"][0], f"{others} stands at the same name (RFC 1034 section 3.6.2)"
        if len(kinds.get("CNAME", [])) == 1 and len(kinds["CNAME"][0].records) > 1:
            yield kinds["CNAME"][0], "a name has one canonical name (RFC 2181 section 10.1)"


def an_alias_leads_to_a_name(records: Records) -> Iterator[Reason]:
    """RFC 1034 section 3.6.2: no alias of an alias, and none of nothing."""
    for rrset in records.of_type("CNAME"):
        for target in rrset.records:
            if records.at(target, "CNAME"):
                yield rrset, f"{target} is an alias itself (RFC 1034 section 3.6.2)"
            elif records.ours(target) and target.rstrip(".") not in records.by_name:
                yield rrset, f"nothing is published at {target}"


def _leads_to_addresses(records: Records, target: str, document: str) -> Iterator[str]:
    if records.at(target, "CNAME"):
        yield f"{target} is an alias ({document})"
    elif records.ours(target) and not (records.at(target, "A") or records.at(target, "AAAA")):
        yield f"{target} has no address ({document}): they come from hosts.*.addresses and gateways"


def an_mx_leads_to_addresses(records: Records) -> Iterator[Reason]:
    """RFC 2181 section 10.3, RFC 5321 section 5.1, RFC 7505 section 3."""
    for rrset in records.of_type("MX"):
        if "0 ." in rrset.records:
            if len(rrset.records) > 1:
                yield rrset, "a null MX stands alone (RFC 7505 section 3)"
            continue
        for record in rrset.records:
            preference, _, target = record.partition(" ")
            if not target.endswith("."):
                yield rrset, f"{target} does not end in a dot"
            if not (preference.isdigit() and int(preference) < 65536):
                yield rrset, f"the preference {preference} is not a number below 65536 (RFC 1035 section 3.3.9)"
            for reason in _leads_to_addresses(records, target, "RFC 2181 section 10.3"):
                yield rrset, reason


def an_srv_leads_to_addresses(records: Records) -> Iterator[Reason]:
    """RFC 2782."""
    for rrset in records.of_type("SRV"):
        if not re.match(r"^_[a-z0-9-]+\._(tcp|udp)\.", rrset.name):
            yield rrset, "the name is not _service._protocol.domain (RFC 2782)"
        for record in rrset.records:
            target = record.rpartition(" ")[2]
            if target == "." and len(rrset.records) > 1:
                yield rrset, "a service that is not offered has this record alone (RFC 2782)"
            elif target != ".":
                for reason in _leads_to_addresses(records, target, "RFC 2782"):
                    yield rrset, reason


def a_reverse_name_leads_back(records: Records) -> Iterator[Reason]:
    """RFC 1912 section 2.1: receivers distrust a sender whose name does not lead back to its address."""
    for rrset in records.of_type("PTR"):
        try:
            address = dns.reversename.to_address(dns.name.from_text(rrset.name))
        except dns.exception.DNSException:
            continue
        if len(rrset.records) > 1:
            yield rrset, "an address has one name (RFC 1912 section 2.1)"
        for target in rrset.records:
            found = {*records.at(target, "A"), *records.at(target, "AAAA")}
            if records.ours(target) and address not in found:
                reason = f"{target} does not lead back to {address} (RFC 1912 section 2.1)"
                yield rrset, f"{reason}: names come from hosts.*.roles and gateways"


def a_text_is_of_short_strings(records: Records) -> Iterator[Reason]:
    """RFC 1035 section 3.3."""
    for rrset in records.of_type("TXT"):
        for record in rrset.records:
            strings = re.findall(r'"((?:[^"\\]|\\.)*)"', record)
            if not strings or any(len(re.sub(r"\\(.)", r"\1", string).encode()) > STRING for string in strings):
                yield rrset, f"a TXT record is of strings of at most {STRING} octets (RFC 1035 section 3.3)"
            if not record.isascii() or not record.isprintable():
                yield rrset, "has other than printable ASCII characters (RFC 7208 section 3.1)"


def spf_is_one_record_of_few_look_ups(records: Records) -> Iterator[Reason]:
    """RFC 7208 sections 3.2, 3.4, 4.6.4 and 5.1."""
    for rrset, values in records.texts("TXT", "v=spf1"):
        if len(values) > 1:
            yield rrset, f"has {len(values)} SPF records, where one may stand (RFC 7208 section 3.2)"
        for value in values:
            if len(value) > 512:
                yield rrset, f"the SPF record has {len(value)} octets: it fits into no answer (RFC 7208 section 3.4)"
            if value.split()[-1] not in ("-all", "~all", "?all") and "redirect=" not in value:
                yield rrset, "the SPF record does not end in -all or ~all (RFC 7208 section 5.1)"
        if (count := _look_ups(records, rrset.name, ())) > SPF_LOOKUPS:
            yield rrset, f"SPF takes {count} look-ups, {SPF_LOOKUPS} are allowed (RFC 7208 section 4.6.4)"


def _look_ups(records: Records, name: str, seen: tuple[str, ...]) -> int:
    """Look-ups that the SPF record of a name takes. What others publish counts as one: theirs are not known here."""
    if name in seen:
        return SPF_LOOKUPS + 1
    count = 0
    values = [value for value in map(joined, records.at(name, "TXT")) if value.lower().startswith("v=spf1")]
    for term in (term for value in values for term in value.split()[1:]):
        kind, _, target = term.lstrip("+-~?").partition("=" if term.startswith("redirect=") else ":")
        if kind.partition("/")[0] in ("include", "a", "mx", "ptr", "exists", "redirect"):
            count += 1
        if kind in ("include", "redirect"):
            count += _look_ups(records, target.rstrip(".").lower(), (*seen, name))
    return count


DMARC_WORDS = {
    **dict.fromkeys(("sp", "np"), ("none", "quarantine", "reject")),
    **dict.fromkeys(("adkim", "aspf"), ("r", "s")),
    "psd": ("y", "n", "u"),
    "t": ("y", "n"),
}
"""What a tag of DMARC may say, where it is there."""
DMARC_REMOVED = {"pct": "remove it, or say t=y for a policy that is only tried", "rf": "remove it", "ri": "remove it"}
"""Tags of RFC 7489 that RFC 9989 has no more, and what to do about each."""


def dmarc_says_a_policy(records: Records) -> Iterator[Reason]:
    """RFC 9989 section 4.7."""
    for rrset in records.of_type("TXT"):
        if not rrset.name.startswith("_dmarc."):
            continue
        if len(rrset.records) > 1:
            yield rrset, "a domain has one DMARC record (RFC 9989 section 4.10)"
        for value in map(joined, rrset.records):
            parts = [tag.partition("=") for tag in value.split(";") if tag.strip()]
            tags = [(name.strip(), said.strip()) for name, _, said in parts]
            names, said = [name for name, _ in tags], dict(tags)
            if tags[:1] != [("v", "DMARC1")] or len(set(names)) < len(names):
                yield rrset, f"{value!r} is not v=DMARC1 and then tags, each once (RFC 9989 section 4.7)"
            if said.get("p") not in ("none", "quarantine", "reject"):
                yield rrset, "has no policy p=none, quarantine or reject (RFC 9989 section 4.7)"
            for name, words in DMARC_WORDS.items():
                if name in said and said[name] not in words:
                    yield rrset, f"{name} is not {', '.join(words[:-1])} or {words[-1]} (RFC 9989 section 4.7)"
            for kind in ("rua", "ruf"):
                if not all(re.match(r"mailto:[^@]+@", uri.strip()) for uri in said.get(kind, "mailto:a@b").split(",")):
                    yield rrset, f"{kind} is not a list of mailto: addresses (RFC 9989 section 4.7)"


def removed_from_dmarc(policy: str) -> Iterator[str]:
    """What to do about the tags of a DMARC policy that receivers pass over: they hold nothing up."""
    names = (tag.partition("=")[0].strip() for tag in policy.split(";"))
    return (
        f"DMARC has no {name} any more (RFC 9989): {DMARC_REMOVED[name]}" for name in names if name in DMARC_REMOVED
    )


def a_dkim_record_is_at_its_place(records: Records) -> Iterator[Reason]:
    """RFC 6376 section 3.6.2.1."""
    for rrset, values in records.texts("TXT", "v=dkim1"):
        if "._domainkey." not in rrset.name or len(values) > 1:
            yield rrset, "a DKIM key stands alone at selector._domainkey.domain (RFC 6376 section 3.6.2)"


def a_tlsa_record_names_a_service_with_addresses(records: Records) -> Iterator[Reason]:
    """RFC 6698 section 3, RFC 7672 section 3.1.1."""
    for rrset in records.of_type("TLSA"):
        port, protocol, host = [*rrset.name.split(".", 2), "", ""][:3]
        if not re.match(r"^_\d+$", port) or protocol not in ("_tcp", "_udp", "_sctp"):
            yield rrset, "the name is not _port._protocol.host (RFC 6698 section 3)"
        for record in rrset.records:
            if not re.match(r"^3 1 1 [0-9a-f]{64}$", record):
                yield rrset, f"{record} is not 3 1 1 and a SHA-256 digest (RFC 7672 section 3.1.1)"
        for reason in _leads_to_addresses(records, host, "RFC 7672 section 2.2"):
            yield rrset, reason


def a_time_to_live_is_sane(records: Records) -> Iterator[Reason]:
    """RFC 2181 section 8; RFC 1912 section 2.2."""
    for rrset in records.all:
        if not 0 <= rrset.ttl <= TTL_MOST:
            yield rrset, f"a TTL of {rrset.ttl} is not from 0 to {TTL_MOST} (RFC 2181 section 8)"
        elif not 30 <= rrset.ttl <= TTL_SANE:
            yield rrset, f"a TTL of {rrset.ttl} s is not from 30 s to a week: a mistake could not be mended for long"


def records_are_of_their_type(records: Records) -> Iterator[Reason]:
    """Each record is read as a name server would read it, and all of a set fit into an answer."""
    for rrset in records.all:
        octets = 0
        for record in rrset.records:
            try:
                rdata = dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.from_text(rrset.type), record)
            except (dns.exception.DNSException, ValueError) as error:
                yield rrset, f"{record!r} is no {rrset.type} record: {error or type(error).__name__}"
            else:
                octets += len(rdata.to_wire(origin=dns.name.root) or b"")
        if octets > RDATA_OCTETS:
            yield rrset, f"its records have {octets} octets: they fit into no answer"


VALIDATORS: tuple[Validator, ...] = (
    names_are_names,
    names_are_in_their_zone,
    the_apex_is_its_operators,
    an_rrset_has_one_origin,
    no_record_stands_twice,
    nothing_stands_beside_a_cname,
    an_alias_leads_to_a_name,
    an_mx_leads_to_addresses,
    an_srv_leads_to_addresses,
    a_reverse_name_leads_back,
    a_text_is_of_short_strings,
    spf_is_one_record_of_few_look_ups,
    dmarc_says_a_policy,
    a_dkim_record_is_at_its_place,
    a_tlsa_record_names_a_service_with_addresses,
    a_time_to_live_is_sane,
    records_are_of_their_type,
)


def problems_of(rrsets: Iterable[RRset]) -> list[Problem]:
    """Every reason of every validator, at the path in the stack file that the RRset comes from."""
    records = Records(rrsets)
    found = {(rrset, reason): None for validator in VALIDATORS for rrset, reason in validator(records)}
    return sorted(Problem(rrset.path, f"{rrset}: {reason}") for rrset, reason in found)
