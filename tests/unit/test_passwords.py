"""Password hashes in a stack file: what Dovecot verifies is taken; what lets nobody in or costs too much is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from model.keys import PLACEHOLDER
from model.load import parse
from model.passwords import SCHEMES
from tests.unit.test_model import problems_of

PASSWORD = "correct horse"
OF_DOVECOT = (
    "{ARGON2ID}$argon2id$v=19$m=65536,t=3,p=1$T70uqpFUi/EThY8z+Eb/nA$ZOld1ERpbW2xzVhNDVQ5XPLz4jyUkDHRhm7bqd/p270",
    "{ARGON2I}$argon2i$v=19$m=32768,t=4,p=1$LCi1HBNuhQB8XnrfS+6l0w$vjVPkn1B2FtkZgaL7oa/di3VmQlyZ4zStD/XKaYp/PM",
    "{BLF-CRYPT}$2y$05$OGetubkBOwv9Q68cZ9uTyunB1kIVYglHAexVjMGDAGKarBoRDGT92",
    "{SHA512-CRYPT}$6$HlhzfnsIXCVf9AlL$6SY9eZ3HdoIfmIWHZFSGMwykvkQ/uhaCJR5DsZxbqEr2A5j5NrHmQ2owZ8u3tJDK7x"
    "7vltHVFRqB9N8Qs6eT.1",
    "{SHA256-CRYPT}$5$wxe2u3G1HuEUfusI$sz0BwSCA8ihXYgqjbpWFnVvkvc6r95w.IsyKPm.Ztx9",
    "{SCRAM-SHA-256}4096,kyHZESme8oGJd25XZx3zVA==,foV09qgcoSPE8EGmTofG0VGl3epRlDJ1hlAfEjuIPIk=,qJgfvZQ7B4"
    "W/w7wDa1/63kQ3Cp9DfsSwOivTS36urks=",
    "{PBKDF2}$1$3sCLOYiSFEYPemyD$5000$342d638858d3ead463636212a6165e12e888c3eb",
    "{SSHA512}i+PQs9DpKpT4JLucoLybviOckVvpdlngEH0aBZZ9ZBIncrF80kEUcnXCEVM5rGJSdSKvUDW7nz4jxJnUNfZi9UEVECY=",
    "{SSHA256}TpNcnaAfhc0qyd0xFy5JcmuquENv+QG3yBI+nEPHVKWtLizh",
)
"""Of that password, as ``doveadm pw`` makes them."""
OF_OTHERS = (
    "{ARGON2ID}$argon2id$v=19$m=102400,t=2,p=8$lzGT++jBUTRujAJeyEkDAA$fYOSkK+1wtQL9ndluepk7w",
    "{ARGON2ID}$argon2id$v=19$m=19456,t=2,p=1$qysDeKozEE8CgYHOY0r0AQ$pSWRsBhfN4H02zbCbKSTmyLq1wkSQfDSI3zdB4fR0bA",
    "{ARGON2ID}$argon2id$v=19$m=131072,t=3,p=4$a6hbhW6pobzwtnf+WBxQ0w$FKvF+DIh9LIBHQXUgh6h0ETig1kvKz45OEJBiGWYwSY",
    "{ARGON2ID}$argon2id$v=19$m=47104,t=1,p=1$1mlqtzkRq9U$hTIyoo9qTqYdgSFwQudLYmMqNwiKld1A",
    "{argon2i}$argon2i$v=19$m=4096,t=6,p=1$+9QjJqJ7Ces0Xqnf/iA4Mg$t682Uc6eNBMDL9oM92Y8nBR36nkukM6N6yvaO8QlfmI",
    "{BLF-CRYPT}$2a$10$Bfu2h.JS1B4zfjkVY.n99uUjKyQ.zBAD5vUZ4.NUdWvInyVp080DO",
    "{BLF-CRYPT}$2b$10$xW/6LVXRWGSkTZIu4Vm0zOM/WZubQmhiVBBpH0G5m99W9eCIbPamO",
    "{SHA512-CRYPT}$6$rounds=656000$abcdefghijklmnop$GMsFcq39Qki4gyijtB4zSRILscNi/107iIjN/PonI7lhUlmIu4Bg"
    "dmtFwuVH8dZOolJRmbXjYdOJeDdMc1kN90",
    "{SHA256-CRYPT}$5$rounds=535000$a_b$G7HgnawOw2YyTSL6KLuZ7b7utJzgi9ng3E6624R6wW0",
    "{SSHA512}bl4enUEhAPwU+ALmX+fOLQ18N/ptpmGbt8vzSXY6/JT3XpwPBj5W4PhjdzXYdEo3vczjNN7xfcL+Zw0cHIbrvWGktgpTaICz",
    "{SSHA256}nV5XRAcXpfmxk3T2a4447PZKk1ImNOXWVXjn742tgzBBM4OvNZh5+SYQdYqRDCes",
)
"""Of that password, as other programs make them: argon2-cffi, PHP, passlib, OpenLDAP."""


def told(config: dict[str, Any], password: str) -> str:
    """What is said of a password of ann; nothing, where it is taken."""
    config["accounts"]["ann"]["password"] = password
    return "\n".join(problems_of(config))


@pytest.mark.parametrize(
    "password",
    [
        "hunter2",
        "!",
        "{PLAIN}hunter2",
        "{CRYPT}hunter2",
        "{MD5-CRYPT}$1$hunter2",
        "{BLF-CRYPT}",
        "{BLF-CRYPT}hunter2:::::user=ben",
    ],
)
def test_a_password_that_is_no_hash_is_refused_and_not_shown(config: dict[str, Any], password: str) -> None:
    said = told(config, password)
    assert said.startswith("accounts.ann.password: must be a hash: put here what make password prints")
    assert "hunter2" not in said


def test_what_both_dovecots_verify_is_taken_whoever_made_it(config: dict[str, Any]) -> None:
    assert {re.match(r"{(.*)}", made)[1] for made in OF_DOVECOT} == set(SCHEMES)  # type: ignore[index]
    for number, made in enumerate((*OF_DOVECOT, *OF_OTHERS)):
        config["accounts"][f"user{number}"] = {"password": made}
    config["accounts"]["ben"]["password"] = PLACEHOLDER
    assert parse("lab", "Pulumi.lab.yaml", config)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_account_may_be_locked(config: dict[str, Any], scheme: str) -> None:
    config["accounts"]["ann"]["password"] = f"{{{scheme}}}!"
    assert parse("lab", "Pulumi.lab.yaml", config)


@pytest.mark.parametrize("made", OF_DOVECOT)
def test_a_hash_that_is_cut_or_has_too_much_is_told(config: dict[str, Any], made: str) -> None:
    begin = made.index("}") + 1
    wanted = f"is no whole {made[:begin]} hash: copy all of it, or put here what make password prints"
    cuts = [made[:-number] for number in range(1, 8)]
    if "$" in made:
        cuts += [made[:begin] + made[begin + number :] for number in range(1, 8)]
    for wrong in (*cuts, made + "!", made + "$x", made[:begin] + "$1$" + made[begin:]):
        assert told(config, wrong) == f"accounts.ann.password: {wanted}", wrong


COSTS = [
    ("$argon2id$v=19$m=65536,", "$argon2id$v=19$m=4194304,", "{ARGON2ID} hash with m=4194304", "8 to 131072"),
    ("$m=65536,", "$m=7,", "m=7", "8 to 131072"),
    ("$m=65536,t=3", "$m=65536,t=4000000000", "t=4000000000", "1 to 16"),
    ("t=3,p=1$", "t=3,p=255$", "p=255", "1 to 16"),
    ("$2y$05$", "$2y$31$", "{BLF-CRYPT} hash with cost=31", "4 to 15"),
    ("$2y$05$", "$2y$03$", "cost=03", "4 to 15"),
    ("$6$", "$6$rounds=999999999$", "{SHA512-CRYPT} hash with rounds=999999999", "1000 to 2000000"),
    ("$5$", "$5$rounds=999$", "{SHA256-CRYPT} hash with rounds=999", "1000 to 2000000"),
    ("}4096,", "}4095,", "{SCRAM-SHA-256} hash with rounds=4095", "4096 to 2000000"),
    ("$5000$", f"${'9' * 5000}$", f"{{PBKDF2}} hash with rounds={'9' * 20}", "1 to 2000000"),
]


@pytest.mark.parametrize(("part", "other", "what", "bounds"), COSTS, ids=[what for _, _, what, _ in COSTS])
def test_a_hash_that_costs_too_much_or_too_little_is_told_with_what_may_be(
    config: dict[str, Any], part: str, other: str, what: str, bounds: str
) -> None:
    (made,) = (made for made in OF_DOVECOT if part in made)
    said = told(config, made.replace(part, other, 1))
    assert f"{what}, and a login may cost {bounds}: put here what make password prints" in said, said
