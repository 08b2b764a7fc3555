"""The scanner's own rules (rspamd.local.lua), run by LuaJIT as in rspamd, with a DNS that answers when told to."""

from __future__ import annotations

import ipaddress
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from lupa.luajit21 import LuaRuntime

from model.load import parse
from model.stack import Stack
from services.bundle import bundle

RULES = "/etc/rspamd/rspamd.local.lua"
RSPAMD = """
symbols, extractors, journal = {}, {}, {}
package.preload.rspamd_util = function() return {} end
package.preload.rspamd_logger = function()
  return { errx = function(_, _, what) table.insert(journal, what) end }
end
package.preload.lua_selectors = function()
  return { register_extractor = function(_, name, extractor) extractors[name] = extractor end }
end
rspamd_config = {
  add_map = function(_, map)
    return { get_key = function(_, key) return look_up(map.url, map.type, tostring(key)) end }
  end,
  register_symbol = function(_, symbol) symbols[symbol.name] = symbol end,
  register_dependency = function() end,
}

local Task = {}
Task.__index = Task
function Task:get_user() return self.user end
function Task:get_from(kind) return self.from[kind] end
function Task:get_recipients() return self.recipients end
function Task:get_from_ip() return nil end
function Task:get_helo() return "mx.far.example" end
function Task:get_header_full() return {} end
function Task:get_header_raw() return self.author end
function Task:get_raw_headers() return "From: " .. self.author .. "\\r\\n" end
function Task:get_metric_action() return self.action end
function Task:has_symbol(name) return self.symbols[name] ~= nil end
function Task:get_symbol(name) return self.symbols[name] and { { options = self.symbols[name] } } end
function Task:insert_result(name, _, ...) self.symbols[name] = { ... } end
function Task:set_pre_result(action, words)
  self.result = self.result or action
  self.words = self.words or words
end
function Task:get_resolver()
  return { resolve = function(_, kind, asked)
    return ask(kind, asked.name, function(text, failure)
      asked.callback(nil, asked.name, text and { text }, failure)
    end)
  end }
end
function new_task(task) return setmetatable(task, Task) end
"""
NOTHING = "no records with this name"
ZONE = {
    "_dmarc.far.example": "v=DMARC1; p=none",
    "_dmarc.reject.far.example": "v=DMARC1; p=reject; psd=n",
    "_dmarc.quarantine.far.example": "v=DMARC1; p=quarantine; psd=n",
    "_dmarc.trial.far.example": "v=DMARC1; p=reject; t=y; psd=n",
    "_dmarc.strict.far.example": "v=DMARC1; p=reject; aspf=s; psd=n",
    "_dmarc.mixed.far.example": "v=DMARC1; p=none; sp=quarantine; np=reject; psd=n",
    "_dmarc.suffix.far.example": "v=DMARC1; p=reject; psd=y",
    "_dmarc.hill.example": "v=DMARC1; p=reject",
}


@dataclass
class Question:
    """What a mail's rules have asked the DNS and wait for."""

    kind: str
    name: str
    told: Callable[[str | None, str | None], None]

    def answer(self) -> None:
        text = ZONE.get(self.name) if self.kind == "txt" else None
        self.told(text, None if text else NOTHING)

    def fail(self, why: str) -> None:
        self.told(None, why)


@dataclass
class Scanner:
    """The rules of a scanner, the lists of its host, and what they ask the DNS."""

    files: Mapping[str, Any]
    is_asked: bool = True
    questions: list[Question] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lua: Any = LuaRuntime(unpack_returned_tuples=True)
        self.lua.globals().look_up = self.look_up
        self.lua.globals().ask = self.ask
        self.lua.execute(RSPAMD)
        self.lua.execute(self.files[RULES]["content"])

    def look_up(self, path: str, kind: str, key: str) -> object:
        """As rspamd's maps do: a set knows names, a map has values, radix knows networks."""
        entries = self.files[path]["content"].splitlines()
        if kind == "map":
            values = dict(line.split(" ", 1) for line in entries)
            return values.get(f'"{key}"', values.get(key))
        listed = [line.strip('"') for line in entries]
        if kind == "radix":
            return any(ipaddress.ip_address(key) in ipaddress.ip_network(network) for network in listed) or None
        return key in listed or None

    def ask(self, kind: str, name: str, told: Callable[[str | None, str | None], None]) -> bool:
        if self.is_asked:
            self.questions.append(Question(kind, name, told))
        return self.is_asked

    def mail(self, *authors: str, spf: str = "", dkim: Sequence[str] = (), **more: Any) -> Any:
        """A mail of these authors, whose envelope SPF has proved to be of a domain, and which domains have signed."""

        def address(text: str) -> dict[str, str]:
            return {"addr": text, "domain": text.rpartition("@")[2]}

        symbols: dict[str, list[str]] = {"DKIM_TRACE": [f"{domain}:+" for domain in dkim]}
        symbols |= {"R_SPF_ALLOW": []} if spf else {}
        envelope = address(more.pop("sender", f"x@{spf or 'far.example'}"))
        task = {
            "from": {"smtp": [envelope], "mime": list(map(address, authors))},
            "symbols": symbols | more.pop("symbols", {}),
            "author": ", ".join(authors),
            "recipients": list(map(address, more.pop("to", ["ann@hill.example"]))),
            **more,
        }
        return self.lua.globals().new_task(self.lua.table_from(task, recursive=True))

    def run(self, rule: str, task: Any) -> Any:
        self.lua.globals().symbols[rule].callback(task)
        return task

    def judge(self, task: Any) -> Any:
        """What DMARC makes of a mail when the DNS answers each question."""
        self.run("DMARC_CHECK", task)
        while self.questions:
            self.questions.pop().answer()
        return task


@pytest.fixture
def scanner(stack: Stack) -> Scanner:
    return Scanner(bundle(stack, stack.all_hosts["frontend-oak"])["files"])


def verdict(task: Any) -> str:
    """The names of DMARC that a mail has got, and its result."""
    names = [name.removeprefix("DMARC_") for name in task.symbols if name.startswith("DMARC_")]
    return " ".join([*sorted(names), *([task.result] if task.result else [])])


CASES = [
    ("x@reject.far.example", "", "POLICY_REJECT reject"),
    ("x@reject.far.example", "reject.far.example", "POLICY_ALLOW"),
    ("x@sub.reject.far.example", "reject.far.example", "POLICY_ALLOW"),
    ("x@sub.reject.far.example", "far.example", "POLICY_REJECT reject"),
    ("x@quarantine.far.example", "", "POLICY_QUARANTINE add header"),
    ("x@trial.far.example", "", "POLICY_SOFTFAIL"),
    ("x@strict.far.example", "sub.strict.far.example", "POLICY_REJECT reject"),
    ("x@nowhere.mixed.far.example", "", "POLICY_REJECT reject"),
    ("x@other.suffix.far.example", "one.suffix.far.example", "POLICY_REJECT reject"),
    ("x@mail.one.suffix.far.example", "one.suffix.far.example", "POLICY_ALLOW"),
    ("x@far.example", "", "POLICY_SOFTFAIL"),
    ("x@other.example", "", "NA"),
    ("ben@hill.example", "far.example", "POLICY_REJECT reject"),
    ("ben@sub.hill.example", "hill.example", "POLICY_ALLOW"),
    # The case and the dot at the end mean nothing.
    ("ben@hill.example.", "far.example", "POLICY_REJECT reject"),
    ("ben@Hill.EXAMPLE.", "hill.example", "POLICY_ALLOW"),
    ("x@reject.far.example.", "Reject.far.example.", "POLICY_ALLOW"),
    ("x@nowhere.mixed.far.example.", "", "POLICY_REJECT reject"),
    # The forwarder that the stack lets through.
    ("x@reject.far.example", "lists.far.example", "POLICY_SOFTFAIL"),
]
"""An author, the domain that SPF proves, and what follows from that."""
FORGED = ("ben@hill.example", "ben@hill.example.")


@pytest.mark.parametrize(("author", "proved", "wanted"), CASES)
def test_an_author_is_judged_as_the_domain_asks(scanner: Scanner, author: str, proved: str, wanted: str) -> None:
    task = scanner.judge(scanner.mail(author, spf=proved))
    assert verdict(task) == wanted
    # An author of ours is told of apart.
    assert ("this mail is not from ben@" in (task.words or "")) == (author in FORGED)
    if proved:
        signed = scanner.judge(scanner.mail(author, dkim=[proved]))
        assert verdict(signed) == ("POLICY_ALLOW" if "strict" in author else wanted)
    assert list(scanner.lua.globals().journal.values()) == []


def test_the_strictest_wish_of_several_authors_is_done(scanner: Scanner) -> None:
    both = scanner.mail("x@far.example", "x@quarantine.far.example", "x@reject.far.example")
    assert verdict(scanner.judge(both)) == "POLICY_REJECT reject"


@pytest.mark.parametrize("seed", range(5))
def test_answers_that_come_out_of_order_reach_the_mails_that_wait_for_them(scanner: Scanner, seed: int) -> None:
    chance, waiting = random.Random(seed), []
    for author, proved, wanted in CASES * 5:
        waiting.append((scanner.run("DMARC_CHECK", scanner.mail(author, spf=proved)), wanted))
    while scanner.questions:
        scanner.questions.pop(chance.randrange(len(scanner.questions))).answer()
    assert [verdict(task) for task, _ in waiting] == [wanted for _, wanted in waiting]


@pytest.mark.parametrize("author", ["x@sub.reject.far.example", "x@nowhere.mixed.far.example"])
def test_a_mail_waits_when_a_question_is_not_answered_whichever_it_is(scanner: Scanner, author: str) -> None:
    whole = scanner.judge(scanner.mail(author))
    assert whole.result == "reject"
    failing, results = 0, []
    while True:
        task, asked = scanner.run("DMARC_CHECK", scanner.mail(author, spf="other.example")), 0
        while scanner.questions:
            question = scanner.questions.pop()
            if asked == failing:
                question.fail("timed out" if failing % 2 else "server fail")
            else:
                question.answer()
            asked += 1
        if asked <= failing:
            break
        results.append(task.result)
        failing += 1
    # Some questions are about what decides nothing any more; none of them lets the mail pass.
    assert set(results) <= {"soft reject", "reject", "add header"} and results.count("soft reject") >= 3, results
    assert list(scanner.lua.globals().journal.values()) == []


def test_a_mail_waits_when_the_dns_cannot_be_asked_or_the_rule_itself_fails(stack: Stack, scanner: Scanner) -> None:
    deaf = Scanner(scanner.files, is_asked=False)
    assert deaf.judge(deaf.mail("x@reject.far.example")).result == "soft reject"
    broken = scanner.run("DMARC_CHECK", scanner.mail("x@reject.far.example"))
    broken.symbols = None
    while scanner.questions:
        scanner.questions.pop().answer()
    assert (broken.result, broken.words) == ("soft reject", "this mail cannot be judged now")
    assert "symbols" in next(scanner.lua.globals().journal.values())


def test_a_long_name_costs_eight_questions(scanner: Scanner) -> None:
    scanner.run("DMARC_CHECK", scanner.mail(f"x@{'a.' * 60}other.example"))
    asked = []
    while scanner.questions:
        question = scanner.questions.pop()
        asked.append(question.name)
        question.answer()
    assert len(asked) == 8 and asked[-1] == "_dmarc.example"


# Who the authors are


BOB, BEN = "bob@far.example", "ben@hill.example"
ONE = [
    BOB,
    f"Bob. T. Smith <{BOB}>",
    f'"Smith, Bob" <{BOB}>',
    f'"{BEN}" <{BOB}>',
    f'"a \\" <{BEN}>" <{BOB}>',
    f"{BEN} <{BOB}>",
    f"{BEN} via a list <{BOB}>",
    f"=?utf-8?q?{BEN}?= <{BOB}>",
    f"=?utf-8?q?=22{BEN}?= <{BOB}>",
    f"({BEN}) {BOB} (his (old) \\) one: {BEN})",
    f"Bob ({BEN}\r\n <{BEN}>) <{BOB}>",
    f'(5" wide) <{BOB}> (6" deep)',
    f'5" Disk <{BOB}>',
    f"<@one.example,@two.example:{BOB}>",
    '<"bob@home"@far.example>',
    '"bob@home"@far.example',
    "bob(at home)@far.example, ,",
    f"<{BOB}",
    f"Bob@work <{BOB}>,",
]
"""What honest mail has been seen with, and what RFC 5322 allows (section 4.4: routes)."""
TWO = [
    f"{BOB} {BEN}",
    f"{BEN}\r\n\t{BOB}",
    f"{BOB}@hill.example",
    f"{BOB} (Bob) {BEN}",
    f'"Bob" {BOB} {BEN}',
    f"{BOB}. {BEN}",
    f"{BOB}; {BEN}",
    f"{BOB}:{BEN}",
    f"<{BOB} {BEN}>",
    f"<{BOB}, {BEN}>",
    f"<{BOB};{BEN}>",
    f"Bob <{BEN} <{BOB}>>",
    f"{BOB} ({BEN}",
    f"<{BOB}> <{BEN}>",
    f"Bob <{BOB}> Ben <{BEN}>",
    f"Bob <{BOB}> {BEN}",
]
"""In each rspamd (3.4 and 3.12) sees one author, the first or the last or both in one, or two; readers see others."""


@pytest.mark.parametrize("author", ONE)
def test_a_strange_way_to_write_one_author_is_taken(scanner: Scanner, author: str) -> None:
    task = scanner.run("NO_ONE_AUTHOR_FIELD", scanner.mail(BOB, author=author))
    assert task.result is None


@pytest.mark.parametrize("seen", [(BOB,), (BOB, BEN)])
@pytest.mark.parametrize("author", TWO)
def test_two_addresses_without_a_comma_are_refused(scanner: Scanner, author: str, seen: tuple[str, ...]) -> None:
    task = scanner.run("NO_ONE_AUTHOR_FIELD", scanner.mail(*seen, author=author))
    assert task.result == "reject" and "one From header" in task.words


@pytest.mark.parametrize("user", [None, "ben"])
@pytest.mark.parametrize("domain", [".", "a.example..", "a..example", ".a.example", "[192.0.2.1]", "höhe.example"])
def test_an_author_in_what_is_no_domain_is_refused(scanner: Scanner, domain: str, user: str | None) -> None:
    task = scanner.run("NO_ONE_AUTHOR_FIELD", scanner.mail(f"ben@{domain}", user=user))
    assert task.result == "reject"


@pytest.mark.parametrize("author", [f"{BOB}, {BEN}", f"{BOB},Ben <{BEN}>", f"Bob <{BOB}>,\r\n <{BEN}>,"])
def test_two_authors_are_taken_where_both_are_looked_at(scanner: Scanner, author: str) -> None:
    task = scanner.run("NO_ONE_AUTHOR_FIELD", scanner.mail(BOB, BEN, author=author))
    assert task.result is None


@pytest.mark.parametrize("form", ["{}", "{}."])
def test_capitals_and_a_dot_at_the_end_change_neither_who_may_write_nor_who_is_kept_out(
    scanner: Scanner, form: str
) -> None:
    own, other, foe = map(form.format, ("Ben+x@Hill.Example", "Ann@Hill.Example", "Foe@Far.Example"))
    assert scanner.run("FROM_OF_ANOTHER", scanner.mail(own, sender=own, user="ben")).result is None
    assert scanner.run("FROM_OF_ANOTHER", scanner.mail(other, sender=own, user="ben")).result == "reject"
    assert scanner.run("FROM_OF_ANOTHER", scanner.mail(own, sender=other, user="ben")).result == "reject"
    for sender, author in ((foe, BOB), (BOB, foe), (BOB, form.format("x@Sub.Pest.Example"))):
        assert scanner.run("DENIED_SENDER", scanner.mail(author, sender=sender)).result == "reject"
    assert scanner.run("DENIED_SENDER", scanner.mail(other, sender=other)).result is None


@pytest.mark.parametrize("part", ["(", "()", '"', ",", "<", '("', "\\", ">", "a@", "<@", "< @a:"])
def test_a_header_that_is_made_to_be_slow_is_read_at_once(scanner: Scanner, part: str) -> None:
    # The longest field that Postfix keeps.
    began = time.process_time()
    scanner.run("NO_ONE_AUTHOR_FIELD", scanner.mail(BOB, author=part * (60000 // len(part))))
    assert time.process_time() - began < 1


# What filters send, and what leads elsewhere


def test_what_filters_send_does_not_count_to_what_their_user_writes(scanner: Scanner) -> None:
    counted = scanner.lua.globals().extractors.posthorn_counted.get_value
    assert counted(scanner.mail(BOB)) is None
    assert counted(scanner.mail(BEN, user="ben")) == ("ben", "string")
    for what in ("says", "redirects"):
        of_filter = scanner.mail(BEN, user="ben", symbols={"OF_A_FILTER": [what]})
        assert counted(of_filter) == ("filters of ben", "string")


@pytest.fixture
def postmaster_abroad(config: dict[str, Any]) -> Iterator[Scanner]:
    config["domains"]["hill.example"]["aliases"]["postmaster"] = ["ann", "admin@far.example"]
    stack = parse("lab", "Pulumi.lab.yaml", config)
    yield Scanner(bundle(stack, stack.all_hosts["frontend-oak"])["files"])


OWN = [
    "abuse@smtp-in.hill.example",
    "root+x@localhost",
    "postmaster@[198.51.100.2]",
    "Root@[IPv6:2001:db8::1]",
]


@pytest.mark.parametrize("recipient", ["partner@hill.example", "Partner+x@HILL.example.", *OWN])
def test_spam_does_not_leave_by_an_address_that_leads_elsewhere(
    scanner: Scanner, postmaster_abroad: Scanner, recipient: str
) -> None:
    spam = postmaster_abroad.run("NOT_SENT_ON", postmaster_abroad.mail(BOB, to=[recipient], action="add header"))
    assert spam.result == "reject" and spam.words.endswith(f"and {recipient} leads elsewhere: it is not sent on")
    good = postmaster_abroad.run("NOT_SENT_ON", postmaster_abroad.mail(BOB, to=[recipient], action="no action"))
    assert good.result is None
    at_home = scanner.run("NOT_SENT_ON", scanner.mail(BOB, to=[recipient], action="add header"))
    assert (at_home.result is None) == (recipient in OWN)


def test_mail_that_a_host_itself_sends_to_a_postmaster_abroad_leads_nowhere_else(postmaster_abroad: Scanner) -> None:
    bounce = postmaster_abroad.mail(BEN, to=["postmaster@far.example"], action="add header")
    assert postmaster_abroad.run("NOT_SENT_ON", bounce).result is None
