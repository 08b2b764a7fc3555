"""What an operator is told about a stack file that is wrong, and what follows from one that is right."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model import invalid
from model.base import StackError
from model.checks import missing_keys
from model.load import load, parse, read_file
from model.network import mac_address
from model.stack import Stack
from ops.keys import certificates_without_names, new_authority
from services.zones import record_problems
from tests.unit.conftest import LAB

OPERATOR = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + 43 * "J"


def problems_of(config: dict[str, Any]) -> list[str]:
    with pytest.raises(StackError) as caught:
        parse("lab", "Pulumi.lab.yaml", config)
    return [str(problem) for problem in caught.value.problems]


def test_a_misspelt_key_is_named_with_its_nearest_neighbour(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["adresses"] = config["hosts"]["smtp-in-oak"].pop("addresses")
    assert problems_of(config) == [
        "hosts.smtp-in-oak.addresses: is missing",
        "hosts.smtp-in-oak.adresses: unknown key, did you mean addresses?",
    ]


def test_an_address_outside_its_prefix_is_refused(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["addresses"]["public"][0] = "198.51.100.77"
    assert problems_of(config) == [
        "hosts.smtp-in-oak.addresses.public[0]: 198.51.100.77 is not in a public prefix of site oak"
        " (198.51.100.0/28, 2001:db8:2:1::/64)"
    ]


def test_two_hosts_with_one_address_are_refused(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-out-oak"]["addresses"]["local"][0] = "198.18.1.11"
    assert problems_of(config) == [
        "hosts.smtp-out-oak.addresses.local[0]: 198.18.1.11 is taken already by hosts.smtp-in-oak.addresses.local[0]"
    ]


def test_hosts_that_no_operator_could_reach_are_named(config: dict[str, Any]) -> None:
    config["access"]["ssh_from"] = ["198.19.0.0/24"]
    config["hosts"]["smtp-in-oak"]["addresses"]["local"].reverse()
    assert problems_of(config) == [
        "access.ssh_from: names no network of IPv6, over which smtp-in-oak would be reached: add yours,"
        " or put their local address of the other family first"
    ]


def test_gateways_are_inside_their_prefixes_and_one_of_each_family(config: dict[str, Any]) -> None:
    config["sites"]["oak"]["public"]["gateways"][0] = "198.51.100.17"
    config["sites"]["elm"]["public"]["gateways"][1] = "fe80::1"
    config["sites"]["elm"]["local"]["gateways"].append("198.18.2.2")
    assert problems_of(config) == [
        "sites.elm.local.gateways: at most one gateway of each family: hosts would get two default routes",
        "sites.oak.public.gateways[0]: 198.51.100.17 is in no public prefix of site oak"
        " (198.51.100.0/28, 2001:db8:2:1::/64)",
    ]


def test_public_addresses_need_an_interface_and_routes_of_their_own(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["machine"]["interfaces"] = 1
    config["access"]["ssh_from"] += ["::/0"]
    assert [problem.partition(":")[0] for problem in problems_of(config)] == [
        "access.ssh_from[2]",
        "hosts.smtp-in-oak.machine.interfaces",
    ]
    for host in config["hosts"].values():
        host["existing"] = {"host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ"}
        del host["machine"]
    assert parse("lab", "Pulumi.lab.yaml", config)


def test_an_alias_to_nowhere_is_refused(config: dict[str, Any]) -> None:
    config["domains"]["hill.example"]["aliases"] |= {"a": "carl", "b": "nobody@moor.example"}
    assert problems_of(config) == [
        "domains.hill.example.aliases.a: there is no account carl",
        "domains.hill.example.aliases.b: nobody@moor.example is in a domain of this stack,"
        " but no account, alias or catch-all takes it",
    ]


def test_aliases_that_lead_in_a_circle_are_refused(config: dict[str, Any]) -> None:
    config["domains"]["hill.example"]["aliases"] |= {"a": "b@moor.example", "b": "a@hill.example"}
    assert problems_of(config) == [
        "domains.hill.example.aliases.a: leads in a circle: a@hill.example → b@moor.example → a@hill.example",
        "domains.hill.example.aliases.b: leads in a circle: b@hill.example → a@hill.example → b@moor.example"
        " → a@hill.example",
    ]


def test_roles_that_want_the_same_cannot_share_a_host(config: dict[str, Any]) -> None:
    config["hosts"]["frontend-ash"]["roles"] = ["frontend", "rspamd", "smtp-out", "maildrop"]
    config["machine_users"]["doors"]["hosts"].remove("frontend-ash")
    del config["hosts"]["maildrop-elm"]
    said, advice = "cannot share a host: each needs", "for itself, so give one of them another"
    mta = "Debian's one mail transport agent"
    assert problems_of(config) == [
        f"hosts.frontend-ash.roles: maildrop and frontend {said} port 465, port 993 and port 4190 {advice}",
        f"hosts.frontend-ash.roles: smtp-out and frontend {said} port 587 {advice}",
        f"hosts.frontend-ash.roles: smtp-out and maildrop {said} {mta} and Dovecot {advice}",
        f"hosts.frontend-ash.roles: smtp-out and rspamd {said} rspamd {advice}",
    ]


def test_a_postmaster_who_leads_back_to_the_postmaster_is_refused(config: dict[str, Any]) -> None:
    config["service"]["postmaster"] = "postmaster@hill.example"
    circle = "leads in a circle: postmaster@hill.example → postmaster@hill.example"
    assert problems_of(config) == [f"service.postmaster: {circle}"]
    config["service"]["postmaster"] = "abuse@moor.example"
    circle = "leads in a circle: abuse@moor.example → abuse@moor.example"
    assert problems_of(config) == [f"service.postmaster: {circle}"]
    config["domains"]["hill.example"]["aliases"]["abuse"] = "ben"
    assert parse("lab", "Pulumi.lab.yaml", config).accepts("postmaster@dale.example")


def test_a_stack_none_of_whose_domains_sends_is_refused(config: dict[str, Any]) -> None:
    for domain in config["domains"].values():
        domain["sends"] = False
    assert any(problem.startswith("domains: none of them sends") for problem in problems_of(config))


def spoilt(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """The configuration with one value in place of another, or beside the others."""
    *folders, name = path.split(".")
    place = config
    for folder in folders:
        place = place.setdefault(folder, {})
    place[name] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("filter.scores", {"greylist": 20, "tag": 10}, "filter.scores: greylist 20.0, tag 10.0, reject 15.0: none"),
        ("filter.scores", {"greylist": -2, "tag": -1, "reject": 0}, "filter.scores.reject: must be above 0"),
        ("filter.scores", {"reject": float("inf")}, "filter.scores.reject: "),
        ("limits.message_rate", 0, "limits.message_rate: "),
        ("limits.message_size", 0, "limits.message_size: "),
        ("limits.message_size", 1000, "limits.message_size: "),
        ("limits.message_size", 2**31, "limits.message_size: "),
        ("limits.header_size", 2**31, "limits.header_size: "),
        ("limits.connections", -5, "limits.connections: "),
        ("limits.sieve_processes", 0, "limits.sieve_processes: "),
        ("dns.servers.lab.port", 0, "dns.servers.lab.port: "),
        ("dns.resolver.bootstrap", [], "dns.resolver.bootstrap: names no resolver, and VMs need one"),
        ("access.operators", ["nonsense"], "access.operators[0]: must be an SSH public key"),
        ("access.operators", [OPERATOR[:-8] + " me"], "access.operators[0]: must be an SSH public key"),
        ("access.operators", [OPERATOR.replace("ed25519", "rsa")], "access.operators[0]: must be an SSH public key"),
        ("access.operators", [f"{OPERATOR}\n{OPERATOR}"], "access.operators[0]: must be an SSH public key"),
        ("service.authorities", ["nonsense"], "service.authorities[0]: must be certificates in PEM"),
        ("machine_users.doors.password", "one\nstack root:x", "machine_users.doors.password: must be one line"),
        ("machine_users.doors.password", "", "machine_users.doors.password: must be one line"),
    ],
)
def test_a_value_that_no_daemon_should_get_is_refused(
    config: dict[str, Any], path: str, value: object, told: str
) -> None:
    problems = problems_of(spoilt(config, path, value))
    assert [problem for problem in problems if problem.startswith(told)] == problems != []


@pytest.mark.parametrize("replies", ["[[", "127.0.0", "127.0.0.[2..]", "127.0.0.[11..2]", "127.0.0.256", "127.0.0.2 x"])
def test_replies_of_a_blocklist_that_postfix_could_not_read_are_refused(config: dict[str, Any], replies: str) -> None:
    config["filter"]["dnsbl"][0]["replies"] = replies
    assert [problem.partition(" tells")[0] for problem in problems_of(config)] == [
        f"filter.dnsbl[0].replies: {replies!r}"
    ]


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("foo", "'foo' leads to no libvirt with QEMU: write qemu+ssh://root@HOST/system?knownhosts=FILE, or"),
        ("qemu+ssh:///system?knownhosts=/k", "'qemu+ssh:///system?knownhosts=/k' leads to no libvirt with QEMU: write"),
        ("qemu+ssh://hv:x/system?knownhosts=/k", "'qemu+ssh://hv:x/system?knownhosts=/k' is not a URI: write"),
        (
            "qemu+ssh://root@hv:2222/system?knownhosts=/k",
            "the plugin pulumi-libvirt 0.5.4 reaches a hypervisor over SSH",
        ),
        ("qemu+ssh://root@[2001:db8::1]/system?knownhosts=/k", "the plugin pulumi-libvirt 0.5.4 reaches a hypervisor"),
        ("qemu+ssh://root@hv/system", "say knownhosts=FILE in it"),
        ("qemu+libssh://root@hv/system?knownhosts=", "say knownhosts=FILE in it"),
        ("qemu+ssh://root@hv/system?knownhosts=/k&no_verify=1", "the host key of a hypervisor is always verified"),
        ("qemu+ssh://root@hv/system?knownhosts=/k&known_hosts_verify=ignore", "the host key of a hypervisor is always"),
    ],
)
def test_a_hypervisor_that_would_not_be_known_for_sure_is_refused(config: dict[str, Any], uri: str, told: str) -> None:
    problems = problems_of(spoilt(config, "sites.oak.hypervisor.uri", uri))
    assert len(problems) == 1 and problems[0].startswith(f"sites.oak.hypervisor.uri: {told}")


@pytest.mark.parametrize(
    "uri",
    [
        "qemu:///system",
        "qemu+unix:///system",
        "qemu+tls://hv/system",
        "qemu+ssh://root@192.0.2.1/system?sshauth=agent&knownhosts=/k/known_hosts",
    ],
)
def test_hypervisors_are_reached_in_every_safe_way(config: dict[str, Any], uri: str) -> None:
    assert parse("lab", "Pulumi.lab.yaml", spoilt(config, "sites.oak.hypervisor.uri", uri))


def test_replies_and_keys_of_every_form_are_taken(config: dict[str, Any]) -> None:
    config["filter"]["dnsbl"][0]["replies"] = "127.0.[0;1].[2..11;14]"
    config["access"]["operators"] = [f" {OPERATOR} me, at home\n"]
    config["service"]["authorities"] = [new_authority("world")[0].rstrip()]
    stack = parse("lab", "Pulumi.lab.yaml", config)
    assert stack.access.operators == (f"{OPERATOR} me, at home",)
    # Texts that follow one another in a file.
    assert stack.service.authorities[0].endswith("-----END CERTIFICATE-----\n")


def test_all_problems_of_a_file_come_at_once(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["addresses"]["public"][0] = "198.51.100.77"
    config["domains"]["hill.example"]["aliases"]["a"] = "carl"
    config["dns"]["servers"]["lab2"] = config["dns"]["servers"].pop("lab")
    assert len(problems_of(config)) == 2 + len(config["dns"]["zones"])


def test_a_broken_file_gets_every_problem_at_once_in_words_of_stack_files(config: dict[str, Any]) -> None:
    config["service"]["website"] = "www.hill.example"
    config["access"]["ssh_from"] = ["192.0.2.7/24"]
    config["accounts"]["ann"]["quota"] = "5 GB"
    config["domains"]["moor.example"]["sends"] = "perhaps"
    config["domains"]["hill.example"]["aliases"] |= {"a": "carl", "b": "x y"}
    config["hosts"]["smtp-in-oak"]["roles"] = "smtp-in"
    config["hosts"]["smtp-in-elm"]["addresses"]["public"][0] = "198.51.100.77"
    config["hosts"]["smtp-out-oak"]["machine"] = config["hosts"]["smtp-out-oak"]["machine"] | {"memory": "much"}
    config["hosts"]["smtp-out-elm"]["release"] = 11
    config["sites"]["ash"]["hypervisor"]["uri"] = "foo"
    config["limits"] = {"connections": 0}
    config["filters"] = config.pop("filter")
    config["dns"]["zones"]["hill.example"] = "nowhere"
    config["dns"]["ttl"] = {"mx": 1}
    with pytest.raises(StackError) as caught:
        parse("lab", "Pulumi.lab.yaml", config, record_problems, missing_keys)
    found = [str(problem) for problem in caught.value.problems]
    keys = [problem for problem in found if problem.endswith(": is missing: run make keys STACK=lab")]
    assert "keys.public.authority: is missing: run make keys STACK=lab" in keys
    assert [problem for problem in found if problem not in keys] == [
        "access.operators: no SSH public key of an operator: nobody could log in",
        "access.ssh_from[0]: 192.0.2.7/24 is not the beginning of a network: write 192.0.2.0/24,"
        " or 192.0.2.7/32 for it alone",
        "accounts.ann.quota: must be a whole number from 1 to 9999999 with M or G: write it as 500M or 5G",
        "dns.zones.hill.example: there is no server nowhere in dns.servers",
        "domains.dale.example: dale.example MX: a TTL of 1 s is not from 30 s to a week: a mistake could not be mended"
        " for long",
        "domains.hill.example.aliases.a: there is no account carl",
        "domains.hill.example.aliases.b[0]: 'x y' cannot be the local part of an address: it has ' '",
        "domains.moor.example.sends: must be true or false",
        "filters: unknown key, did you mean filter?",
        "hosts.smtp-in-elm.addresses.public[0]: 198.51.100.77 is not in a public prefix of site elm"
        " (198.51.100.16/28, 2001:db8:2:2::/64)",
        "hosts.smtp-in-oak.roles: must be a list: write it as [one, another]",
        "hosts.smtp-out-elm.release: must be 12 or 13",
        "hosts.smtp-out-oak.machine.memory: must be a whole number",
        "limits.connections: must be at least 1",
        "service.website: must be a web address: write it as https://www.example.org/",
        "sites.ash.hypervisor.uri: 'foo' leads to no libvirt with QEMU: write qemu+ssh://root@HOST/system?"
        "knownhosts=FILE, or qemu:///system for this machine",
    ]


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "Pulumi.x.yaml"
    file.write_text("config:\n  posthorn:accounts:\n    ann: {}\n    ann: {}\n")
    with pytest.raises(StackError, match="line 4: the key ann stands twice"):
        load(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"config:\n  posthorn:dkim: {selector: s\xe9}\n", "line 2: is not UTF-8: save the file as UTF-8"),
        (b"config:\n  a: \x07\n", "line 2: holds a character that YAML refuses: special characters are not allowed"),
        (b"config:\n  {{ x }}: y\n", "line 2: a key is not read as text: put it in quotes"),
        (b"config:\n  [x]: y\n", "line 2: a key is not read as text: put it in quotes"),
        (b"config:\n  posthorn:accounts:\n    no: {}\n", "line 3: the key no is not read as text: put it in quotes"),
        (
            b"config:\n  posthorn:domains:\n    a.example: {aliases: {0190: ann}}\n",
            "line 3: 0190 is not read as text by Pulumi: put it in quotes",
        ),
        (
            b"config:\n  posthorn:accounts:\n    1e5: {}\n",
            "line 3: 1e5 is not read as text by Pulumi: put it in quotes",
        ),
        (b"config:\n  - 0o17\n", "line 2: 0o17 is not read as text by Pulumi: put it in quotes"),
        (b"config:\n  - 2026-1-2\n", "line 2: 2026-1-2 is not read as text by Pulumi: put it in quotes"),
        (b"config: [\n", "line 2: expected the node content, but found '<stream end>'"),
        (b"nothing", "config: the file has no config section"),
        (b"", "config: the file has no config section"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_by_its_line(tmp_path: Path, text: bytes, told: str) -> None:
    file = tmp_path / "Pulumi.x.yaml"
    file.write_bytes(text)
    with pytest.raises(StackError) as caught:
        load(file)
    assert [str(problem) for problem in caught.value.problems] == [told]


def test_a_folder_in_place_of_a_file_is_told_and_numbers_beside_our_keys_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="file: cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "Pulumi.x.yaml").write_text("config:\n  1: other\n  posthorn:dns: {}\n")
    assert read_file(tmp_path / "Pulumi.x.yaml") == {"dns": {}}


RUBBISH: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    "",
    "x",
    "x y\n",
    [],
    [[]],
    ["x", "x"],
    {},
    {"x": {}},
    {1: 2, "x": None},
)


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a configuration."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def test_rubbish_at_any_place_is_told_and_never_a_traceback() -> None:
    sound = read_file(LAB) | {"keys": {"public": {}, "private": "{}"}}
    for number, place in enumerate(itertools.islice(places(sound), None, None, 3)):
        config = copy.deepcopy(sound)
        holder: Any = config
        for key in place[:-1]:
            holder = holder[key]
        # Not all rubbish everywhere: other rubbish at each place.
        holder[place[-1]] = RUBBISH[number % len(RUBBISH)]
        with contextlib.suppress(StackError):
            parse("lab", "Pulumi.lab.yaml", config, record_problems)


def test_what_stands_in_for_a_wrong_value_is_never_told_of(keyed_config: dict[str, Any]) -> None:
    more = (record_problems, missing_keys, certificates_without_names)
    every = places({key: keyed_config[key] for key in keyed_config if key != "keys"})
    for number, place in enumerate(itertools.islice(every, None, None, 3)):
        config = copy.deepcopy(keyed_config)
        holder: Any = config
        for key in place[:-1]:
            holder = holder[key]
        if isinstance(holder[place[-1]], dict | list):
            continue
        holder[place[-1]] = [[]] if number % 2 else {"x": {}}
        alone = invalid.read({**config, "name": "lab"}).problems
        try:
            parse("lab", "Pulumi.lab.yaml", config, *more)
        except StackError as error:
            # Rubbish that could be a value is another matter.
            assert not alone or error.problems == sorted(alone), place


def test_every_key_that_has_to_be_there_has_a_stand_in(config: dict[str, Any]) -> None:
    for place in places(config):
        missing = copy.deepcopy(config)
        holder: Any = missing
        for key in place[:-1]:
            holder = holder[key]
        del holder[place[-1]]
        assert invalid.read({**missing, "name": "lab"}).stack, place


def test_private_keys_that_were_spoilt_are_told_without_a_word_of_them(config: dict[str, Any]) -> None:
    config["keys"] = {"private": "{'srs': very-secret"}
    assert problems_of(config) == [
        "keys.private: is not what make keys wrote: take it from an earlier commit",
    ]


def test_nobody_is_both_let_in_and_kept_out_and_our_own_domains_are_neither(config: dict[str, Any]) -> None:
    both = {"clients": ["192.0.2.0/24"], "senders": ["x@far.example", "Hill.example", "ann@moor.example"]}
    config["filter"] |= {"allow": both, "deny": {"clients": ["192.0.2.0/24"], "senders": ["x@far.example", "example"]}}
    own = "is a domain of this stack: who writes as it logs in, or is looked at as all others"
    assert problems_of(config) == [
        f"filter.allow.senders[1]: hill.example {own}",
        f"filter.allow.senders[2]: moor.example {own}",
        "filter.deny.clients[0]: 192.0.2.0/24 stands under filter.allow too",
        "filter.deny.senders[0]: x@far.example stands under filter.allow too",
        f"filter.deny.senders[1]: dale.example {own}",
    ]


def test_a_secret_is_never_shown_in_a_problem(config: dict[str, Any]) -> None:
    config["accounts"]["ann"]["password"] = ["very-secret"]
    assert "very-secret" not in "\n".join(problems_of(config))


@pytest.mark.parametrize("name", ["john.doe", "a_b-c.d", "x", "1st", "a--b", "john.x.doe"])
def test_an_account_may_be_called_as_people_are(config: dict[str, Any], name: str) -> None:
    config["accounts"][name] = config["accounts"]["ann"]
    config["domains"]["hill.example"]["aliases"]["j"] = f"{name}+j"
    assert parse("lab", "Pulumi.lab.yaml", config).logins["j@hill.example"] == name


BAD = (
    "John",
    ".john",
    "john.",
    "..",
    "a..b",
    "-a",
    "a_",
    "a/b",
    "a+b",
    "a b",
    "a:b",
    "a,b",
    "#a",
    "%u",
    "",
    "jö",
    "a\n",
)


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_would_be_unsafe_in_a_path_or_a_map_is_refused(config: dict[str, Any], name: str) -> None:
    config["accounts"][name] = config["accounts"]["ann"]
    (said,) = problems_of(config)
    assert "must be small letters and digits, with single dots, - or _ between them" in said


def test_an_address_as_an_account_is_refused_with_what_to_do(config: dict[str, Any]) -> None:
    config["accounts"]["john@hill.example"] = config["accounts"]["ann"]
    assert problems_of(config) == [
        "accounts.john@hill.example: 'john@hill.example' is an address: name the account john, and let an alias of that"
        " name lead to it in domains.hill.example"
    ]


def test_a_machines_password_that_cannot_be_hashed_is_refused(config: dict[str, Any]) -> None:
    config["machine_users"]["doors"]["password"] = "ü" * 36 + "x"
    assert problems_of(config) == ["machine_users.doors.password: has more than 72 bytes: bcrypt hashes no more"]


def test_hosts_are_named_after_their_role_and_site(stack: Stack) -> None:
    assert stack.all_hosts["smtp-in-oak"].fqdn == "smtp-in.oak.net.hill.example"


def test_a_domain_that_equals_another_accepts_the_same_addresses(stack: Stack) -> None:
    assert stack.accepts("sales@moor.example")
    assert stack.accepts("ann+shop@moor.example")
    assert not stack.accepts("nobody@moor.example")


def test_every_domain_takes_mail_for_postmaster_and_abuse(stack: Stack) -> None:
    assert all(stack.accepts(f"{name}@{domain}") for domain in stack.domains for name in ("postmaster", "abuse"))


def test_mail_can_leave_from_every_gateway_and_every_mx(stack: Stack) -> None:
    sources = set(map(str, stack.leaves_from()))
    assert {"198.51.100.129", "2001:db8:2:f::3", "198.51.100.34", "2001:db8:2:2::2"} <= sources


def test_a_mac_address_depends_on_the_name_alone(config: dict[str, Any]) -> None:
    config["hosts"]["smtp-in-oak"]["addresses"]["local"][0] = "198.18.1.99"
    moved: Stack = parse("lab", "Pulumi.lab.yaml", config)
    assert moved.all_hosts["smtp-in-oak"].mac(0) == mac_address("smtp-in-oak", 0)


def test_the_aliases_of_a_domain_are_put_together_once_however_many_of_them_lead_there(
    config: dict[str, Any],
) -> None:
    config["domains"]["hill.example"]["aliases"] |= {f"x{i}": [f"x{i + 1}@hill.example"] for i in range(100)}
    config["domains"]["hill.example"]["aliases"]["x100"] = ["away@far.example"]
    stack = parse("lab", "Pulumi.lab.yaml", config)
    made = stack.resolved_aliases("hill.example")
    assert all(map(stack.leaves, made["x0"])) and stack.resolved_aliases("hill.example") is made
