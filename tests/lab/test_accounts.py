"""An account comes, is used by its name and by its address, and goes."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle

import bcrypt
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lab import foreign
from services import dovecot
from services.table import table
from tests.lab.conftest import Lab
from tests.lab.steps import MX, eventually, forget, id_of, in_mailbox, log, mail, on, submission, waiting
from tests.lab.test_check import found
from tests.unit.test_names import ALIAS, LOCAL_PARTS, taken
from tests.unit.test_passwords import OF_DOVECOT, OF_OTHERS

NAME, ADDRESS, PASSWORD = "john.d_oe-2", "doe@dale.example", "a lab's secret"
MAILDROP_ADDRESS = f"{NAME}+shop@maildrop.net.hill.example"
"""Where the alias leads, and a mailbox host is asked for."""
MAILDROPS = ("maildrop-oak", "maildrop-elm")


@contextmanager
def written_to_all_the_while(lab: Lab) -> Iterator[list[str]]:
    """Every second somebody writes to the address at another MX. Gives the Message-IDs of what was taken."""
    ended, taken = threading.Event(), list[str]()

    def write() -> None:
        for server in cycle(MX.values()):
            text = mail(to=ADDRESS).removesuffix(".\r\n")
            one = {"mail": "MAIL FROM:<bob@far.example>", "rcpt": [f"RCPT TO:<{ADDRESS}>"], "data": text}
            said = lab.client("deliver", server=server, port=25, source="203.0.113.71", mails=[one])
            if said.get("replies", [[""]])[0][-1].startswith("250"):
                taken.append(id_of(text))
            if ended.wait(1):
                return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield taken
    finally:
        ended.set()
        thread.join()


def missing(lab: Lab, taken: list[str]) -> set[str]:
    """Which of some mails no mailbox has: neither the account's, whoever knows it still, nor that of the catch-all."""
    look = ("grep", "-rhoE", "<[0-9a-f]{16}@far[.]example>", f"/var/vmail/users/{NAME}", "/var/vmail/users/ben")
    return set(taken) - {line for host in MAILDROPS for line in lab.run(host, *look).stdout.split()}


def told(lab: Lab) -> list[dict[str, str]]:
    """What the check says of the mailbox."""
    return [finding for finding in found(lab)["findings"] if finding["where"] == NAME]


@pytest.mark.on_release(13)
def test_an_account_comes_and_goes_and_its_mailbox_stays_until_it_is_removed_by_word(unchanged: Lab) -> None:
    lab, before = unchanged, unchanged.stack_file.read_text()
    hashed = "{BLF-CRYPT}" + bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()
    lab.change(lambda config: config["accounts"].update({NAME: {"password": hashed, "quota": "100M"}}))
    preview = lab.ops("preview", lab.stack_name).stdout
    assert f"accounts.{NAME}: gets no mail, as no alias of any domain leads to it" in preview
    # The catch-all of the domain takes what comes before.
    lab.change(lambda config: config["domains"]["dale.example"]["aliases"].update({"doe": f"{NAME}+shop"}))
    with written_to_all_the_while(lab) as taken:
        assert "gets no mail" not in lab.up()
    assert len(taken) > 3
    eventually(lambda: not missing(lab, taken))

    message_id = foreign.send(lab.state, sender="bob@far.example", to=ADDRESS, subject="To doe")
    for login in (NAME, ADDRESS.upper()):
        assert in_mailbox(lab, login, message_id, password=PASSWORD)
    for host in MAILDROPS:
        eventually(partial(on, lab, host, NAME, message_id))
    sent = {"from": ADDRESS, "recipients": ["bob@far.example"]}
    said = submission(lab, user=ADDRESS, password=PASSWORD, **sent)
    assert said["auth"][0] == 235 and said["rcpt"][0] == 250, said
    assert told(lab) == []

    lab.stack_file.write_text(before)
    with written_to_all_the_while(lab) as taken:
        lab.up()
    # What the MX took while it knew the address and the mailbox hosts did not any more waits: at the MX, or at a
    # mailbox host that took it and forgot the account before it delivered. Nobody is sent a bounce.
    hosts = [*(f"smtp-in-{site}" for site in MX), *MAILDROPS]
    eventually(lambda: len(missing(lab, taken)) == sum(len(waiting(lab, host, MAILDROP_ADDRESS)) for host in hosts))
    for host in hosts:
        assert f"to=<{NAME}" not in log(lab, host, "status=bounced")
        forget(lab, host, MAILDROP_ADDRESS)
    assert "error" in lab.client("look", server="imap.hill.example", user=NAME, password=PASSWORD)
    (finding,) = told(lab)
    assert finding["severity"] == "note" and "a mailbox without an account is kept" in finding["what"], finding
    words = finding["advice"].rpartition(": ")[2]
    assert words == f"rm -r /var/vmail/users/{NAME}"
    for host in MAILDROPS:
        assert host in finding["advice"] and lab.run(host, *shlex.split(words)).returncode == 0
    assert told(lab) == []


def test_postfix_finds_every_address_that_the_stack_takes(lab: Lab) -> None:
    look = "cat >/tmp/addresses; sed 's/ .*//' /tmp/addresses | postmap -q - texthash:/tmp/addresses; rm /tmp/addresses"

    # None is made smaller when it fails: each try asks the host.
    @settings(max_examples=4, derandomize=True, deadline=None, database=None, phases=(Phase.generate,))
    @given(st.sets(LOCAL_PARTS, min_size=20, max_size=60))
    def each_is_found(locals_: set[str]) -> None:
        read = {local for value in locals_ if (local := taken(ALIAS, value)) not in (None, "*")}
        told = lab.run("maildrop-oak", "sh", "-c", look, text=table({f"{local}@hill.example": "x" for local in read}))
        assert {line.partition("@hill.example\t")[0] for line in told.stdout.splitlines()} == read

    each_is_found()


def test_hashes_that_a_stack_file_may_have_let_their_users_in(lab: Lab) -> None:
    before = lab.run("maildrop-oak", "cat", dovecot.LOGINS).stdout
    lines = {f"user{number}": made for number, made in enumerate((*OF_DOVECOT, *OF_OTHERS))}
    added = "".join(f"{name}:{made}\n" for name, made in lines.items())
    lab.run("maildrop-oak", "sh", "-c", f"cat >{dovecot.LOGINS}", text=before + added)
    try:
        each = 'for name in "$@"; do doveadm auth test "$name" "correct horse" || exit; done'
        done = lab.run("maildrop-oak", "sh", "-c", each, "sh", *lines)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        forgotten = f"cat >{dovecot.LOGINS} && doveadm auth cache flush"
        assert lab.run("maildrop-oak", "sh", "-c", forgotten, text=before).returncode == 0


@pytest.mark.parametrize("host", ["maildrop-oak", "smtp-out-oak"])
def test_users_log_in_by_addresses_with_other_letters(lab: Lab, host: str) -> None:
    logins = ["o'neil@hill.example", "r&d@hill.example", "a+b@hill.example", "info@bücher.example"]
    before = lab.run(host, "cat", dovecot.LOGINS).stdout
    (password,) = (line.removeprefix("ann:") for line in before.splitlines() if line.startswith("ann:"))
    lines = "".join(f"{name}:{password}::::::user=ann\n" for name in logins)
    lab.run(host, "sh", "-c", f"cat >{dovecot.LOGINS}", text=before + lines)
    try:
        for login in [*logins, "O'Neil@Hill.Example"]:
            done = lab.run(host, "doveadm", "auth", "test", login, lab.state.passwords["ann"])
            assert done.returncode == 0, (login, done.stdout + done.stderr)
        assert lab.run(host, "doveadm", "auth", "test", "x@bücher.example", "no").returncode != 0
    finally:
        lab.run(host, "sh", "-c", f"cat >{dovecot.LOGINS}", text=before)
