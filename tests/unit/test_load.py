"""What is told of a day of the lab's people: every mail that was taken, and whatever a user would complain about."""

from __future__ import annotations

from typing import Any

import pytest

from lab.load import ABROAD, Day, Told, live
from lab.people import FULL, PEOPLE, accounts, aliases
from lab.state import LabError, State
from model.load import parse

DONE: dict[str, Any] = {"times": [0.1], "refused": []}
TO = "ada@hill.example"


def told(inbound: dict[str, tuple[str, float]], abroad: set[str] | None = None, **said: Any) -> Told:
    """A day of which the users say what is given, and nothing else of note."""
    nothing = {"logins": DONE, "mails": DONE, "pages": DONE, "ended": [], "arrived": {}, "submitted": {}, "missing": []}
    return Told(Day(), 1, {"opened_in": 1.0, **nothing, **said}, inbound, abroad or set())


def test_a_day_on_which_each_mail_arrived_once_has_nothing_wrong() -> None:
    day = told({"<1@x>": (TO, 5.0)}, {"<2@x>"}, arrived={"<1@x>": [["ada", 7.5]]}, submitted={"<2@x>": [ABROAD, 6.0]})
    assert day.wrong == [] and day.ways(day.inbound) == [2.5]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"missing": ["<1@x>"]}, "<1@x> did not arrive"),
        ({"submitted": {"<2@x>": [ABROAD, 6.0]}}, "<2@x> did not arrive"),
        ({"arrived": {"<1@x>": [["ada", 7.0], ["ada", 8.0]]}}, "<1@x> arrived 2 times for ada"),
        ({"arrived": {"<1@x>": [["bo", 7.0]]}}, "<1@x> came to bo"),
        ({"logins": {"times": [], "refused": ["OSError: x NO"]}}, "logins: OSError: x NO"),
        ({"pages": {"times": [], "refused": ["the webmail answers 500"]}}, "pages: the webmail answers 500"),
        ({"ended": ["the server closed the session"]}, "a session ended: the server closed the session"),
    ],
)
def test_what_a_user_would_complain_about_is_told(said: dict[str, Any], words: str) -> None:
    assert told({"<1@x>": (TO, 5.0)}, **said).wrong == [words]


def test_no_more_people_have_a_day_than_the_lab_has() -> None:
    with pytest.raises(LabError, match="this lab has 10 people whose mailboxes are not full"):
        live(State(people=(*PEOPLE[:10], *FULL)), Day(users=11))


def test_with_its_two_accounts_the_lab_has_two_hundred_of_whom_each_has_an_address(config: dict[str, Any]) -> None:
    config["accounts"] |= accounts(PEOPLE, "{BLF-CRYPT}!")
    config["domains"]["hill.example"]["aliases"] |= aliases(PEOPLE)
    stack = parse("lab", "Pulumi.lab.yaml", config)
    assert len(stack.accounts) == 200 and not stack.without_address
