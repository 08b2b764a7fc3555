"""Names and addresses: found by every program that reads them, as they were written; or refused with a reason."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from check.trace import wanted
from model.base import HostName, Sender, StackError
from model.load import parse, read_file
from model.mail import LocalPartOrCatchAll
from model.stack import Stack
from services import dovecot, rspamd, smtp_in
from services.senders import authors, owners
from services.table import entries, table
from tests.unit.conftest import LAB

SYNTAX = "#*%!-+/|{}$'\"`=?^~&., @:;<>()[]\\\t"
LOCAL_PARTS = st.one_of(
    st.text(alphabet="aZ09" + SYNTAX, min_size=1, max_size=6),
    st.text(alphabet="abc.", min_size=50, max_size=80),
    st.text(min_size=1, max_size=8),
)
ALIAS: TypeAdapter[str] = TypeAdapter(LocalPartOrCatchAll)
SENDER: TypeAdapter[str] = TypeAdapter(Sender)
HOST: TypeAdapter[str] = TypeAdapter(HostName)
CONFIG = read_file(LAB)
PROPERTY = settings(deadline=None, derandomize=True, database=None)


def taken(by: TypeAdapter[str], value: str) -> str | None:
    """How a value is read; None where it is refused, with a sentence."""
    try:
        return by.validate_python(value)
    except ValidationError as error:
        assert re.match(r"Value error, .*\b(is|has|ends|cannot|must)\b.+", error.errors()[0]["msg"], re.DOTALL)
        return None


def of(config: dict[str, Any], **domains: Any) -> Stack:
    spoilt = copy.deepcopy(config)
    for name, domain in domains.items():
        spoilt["domains"][name] = domain
        spoilt["dns"]["zones"].setdefault(name, None)
    return parse("lab", "Pulumi.lab.yaml", spoilt)


def problems(config: dict[str, Any], **domains: Any) -> list[str]:
    with pytest.raises(StackError) as caught:
        of(config, **domains)
    return [str(problem) for problem in caught.value.problems]


# What programs make of their files


def texthash(text: str) -> dict[str, str]:
    """Postfix: a line that begins with # is a comment, one that begins with a space goes on (postmap(1)); " quotes."""
    found: dict[str, str] = {}
    for line in re.sub(r"\n[ \t]+", " ", text).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            assert not line.startswith('"')
            key, _, value = line.partition(" ")
            found[key.lower()] = value.strip()
    return found


def rspamd_map(text: str) -> dict[str, str]:
    """rspamd: # begins a comment where it stands; a key is in quotes, between slashes, or goes on to a space."""
    forms = r'(?:"((?:[^"\\]|\\.)*)"|(/(?:[^/\\]|\\.)*/\w*)|([^#\s]+))\s*([^#]*)'
    found = filter(None, (re.match(forms, line) for line in text.splitlines()))
    return {read[1] or read[2] or read[3]: read[4].strip() for read in found}


def passwd_file(text: str) -> dict[str, str]:
    """Dovecot: a line that begins with # or a colon is none; a name goes on to the first colon."""
    lines = (line.partition(":") for line in text.splitlines() if line[:1] not in "#:")
    return {name: rest for name, _, rest in lines}


@PROPERTY
@given(st.sets(LOCAL_PARTS, min_size=1, max_size=40))
def test_every_address_that_is_taken_is_found_by_those_who_read_it_and_no_other_changes(locals_: set[str]) -> None:
    read = {local for value in locals_ if (local := taken(ALIAS, value)) is not None}
    stack = of(CONFIG, **{"moor.example": {"aliases": dict.fromkeys(read, "ann")}})
    virtual = texthash(table(smtp_in.virtual(stack)))
    senders, written = texthash(table(owners(stack))), rspamd_map(table(authors(stack)))
    logins = passwd_file(dovecot.logins_file(stack).content)
    for local in read:
        address = f"{'' if local == '*' else local}@moor.example"
        assert virtual[address] == f"ann@{stack.mailbox_domain}"
        if local != "*":
            assert "ann" in senders[address].split(", ")
            assert address in written["ann"].split(",")
            assert logins[address].endswith("user=ann")
    assert virtual["ben@hill.example"] == f"ben@{stack.mailbox_domain}"
    assert "ben@hill.example" in written["ben"].split(",")


@PROPERTY
@given(st.sets(LOCAL_PARTS, min_size=1, max_size=40))
def test_every_sender_that_is_named_is_in_the_list_that_the_scanners_read(locals_: set[str]) -> None:
    read = {sender for value in locals_ if (sender := taken(SENDER, f"{value}@far.example")) is not None}
    assert set(rspamd_map(entries(read))) == read
    assert taken(SENDER, "#sale@far.example") == "#sale@far.example"


@pytest.mark.parametrize(
    ("local", "told"),
    [
        ("#sales", "'#sales' cannot be the local part of an address here: # begins a comment"),
        ("-x", "Postfix takes none that begins with -"),
        ("team-*", "* stands for all other addresses of a domain, and only alone"),
        ("a%b", "% routes a mail on"),
        ("a!b", "! routes a mail on"),
        ("a" * 70, "it has 70 letters, and 64 are the most"),
        ("müller", "it has letters that are not ASCII"),
        ("a b", "it has ' '"),
        ("a..b", "a dot stands between two letters"),
        ("ann@hill.example", "is an address: write what stands before the @ alone"),
        ("", "is empty"),
    ],
)
def test_a_local_part_is_refused_by_its_reason(config: dict[str, Any], local: str, told: str) -> None:
    config["domains"]["hill.example"]["aliases"][local] = "ann"
    (problem,) = problems(config)
    assert problem.startswith("domains.hill.example.aliases.") and told in problem


def test_what_may_be_written_as_is_an_address_as_good_as_an_alias(config: dict[str, Any]) -> None:
    config["accounts"]["ann"]["send_as"] = ["#x@hill.example", "o'neil@hill.example"]
    (problem,) = problems(config)
    assert problem.startswith("accounts.ann.send_as[0]: '#x' cannot be the local part of an address here")


def test_others_may_have_addresses_that_ours_may_not_have(config: dict[str, Any]) -> None:
    config["domains"]["hill.example"]["aliases"]["partner"] = "#a%b@my_shop.far.example"
    config["filter"]["deny"] = {"senders": ["-x@far.example", "#y@far.example"]}
    stack = of(config)
    assert texthash(table(smtp_in.virtual(stack)))["partner@hill.example"] == "#a%b@my_shop.far.example"
    assert set(rspamd_map(entries(rspamd.lists(stack)["denied-senders"]))) == {"-x@far.example", "#y@far.example"}


# Keys that are one


@pytest.mark.parametrize(
    ("one", "other", "read"),
    [
        ("new.example", "New.Example", "new.example"),
        ("new.example", "new.example.", "new.example"),
        ("bücher.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("bu\u0308cher.example", "BÜCHER.example", "xn--bcher-kva.example"),
    ],
)
def test_a_domain_that_is_written_in_two_ways_stands_twice(
    config: dict[str, Any], one: str, other: str, read: str
) -> None:
    config["dns"]["zones"][read] = None
    for name, address in ((one, "a"), (other, "b")):
        config["domains"][name] = {"aliases": {address: "ann"}}
    first, second = sorted((one, other))
    assert problems(config) == [f"domains.{second}: stands twice (as {first} too): both are read as {read}"]


def test_keys_that_are_one_are_told_of_every_map_and_beside_all_else_that_is_wrong(config: dict[str, Any]) -> None:
    config["domains"]["hill.example"]["aliases"] |= {"Sales": "ann", "sales": "ben"}
    config["dns"]["zones"]["Hill.Example."] = None
    config["accounts"]["ann"]["quota"] = "0M"
    assert problems(config) == [
        "accounts.ann.quota: must be a whole number from 1 to 9999999 with M or G: write it as 500M or 5G",
        "dns.zones.hill.example: stands twice (as Hill.Example. too): both are read as hill.example",
        "domains.hill.example.aliases.sales: stands twice (as Sales too): both are read as sales",
    ]


# Names in other scripts


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("straße.example", "xn--strae-oqa.example"),
        ("STRAẞE.example", "xn--strae-oqa.example"),
        ("βόλος.example", "xn--nxasmm1c.example"),
        ("bücher.example.", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_an_international_name_is_the_one_that_was_written(written: str, read: str) -> None:
    assert taken(HOST, written) == read


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("Ⅷ.example", "Codepoint U+2177 at position 1 of 'ⅷ' not allowed"),
        ("☃.example", "not allowed"),
        ("a。example", "not allowed"),
        ("ü" * 60 + ".example", "Label too long"),
        ("my_shop.example", "has a _, which no name of a host or of a mail domain has"),
        ("192.0.2.1", "ends in a number, as only addresses do"),
        ("a" * 64 + ".example", "64 letters between two dots, and 63 are the most"),
        ("a." * 124 + "example", "has 255 letters, and 253 are the most"),
    ],
)
def test_a_name_that_nobody_could_register_is_refused_with_the_reason(written: str, told: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        HOST.validate_python(written)


@PROPERTY
@given(st.text(min_size=1, max_size=20))
def test_whatever_is_written_as_a_name_is_read_alike_again_or_refused_in_a_sentence(text: str) -> None:
    read = taken(HOST, text)
    assert read is None or (read.isascii() and taken(HOST, read) == read)


def test_users_of_an_international_domain_log_in_by_the_address_as_they_type_it(config: dict[str, Any]) -> None:
    stack = of(config, **{"bücher.example": {"aliases": {"info": "ann"}}})
    for domain in ("bücher.example", "xn--bcher-kva.example"):
        assert stack.logins[f"info@{domain}"] == "ann"
        assert stack.logins[f"ben@{domain}"] == "ben"
    assert "info@bücher.example:" in dovecot.logins_file(stack).content


def test_a_mail_is_looked_for_under_the_form_in_which_it_travels() -> None:
    assert wanted("ann@bücher.example") == wanted("ann@xn--bcher-kva.example")
    assert wanted("<Ann@BÜCHER.example>") == {"<ann@xn--bcher-kva.example>"}


def test_a_name_of_an_account_that_is_too_long_is_told_its_length(config: dict[str, Any]) -> None:
    config["accounts"]["a" * 64] = config["accounts"]["ann"]
    assert problems(config)[0].endswith("has 64 letters, and 63 are the most")


@pytest.mark.parametrize("quota", ["0M", "0G", "00M", "007M", "99999999G", "1T"])
def test_a_quota_that_dovecot_would_take_for_another_is_refused(config: dict[str, Any], quota: str) -> None:
    config["accounts"]["ann"]["quota"] = quota
    assert problems(config)[0].startswith("accounts.ann.quota: must be a whole number from 1")
