"""What a user does in the web mail, with a real browser; and what strangers meet there."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator

import pytest

from lab import containers, faults, foreign
from lab.browser import Browser, browser
from tests.lab.conftest import Lab
from tests.lab.steps import eventually, in_mailbox, stopped

NAME = "webmail.hill.example"
FRONT_ENDS = {"oak": "198.51.100.3", "elm": "198.51.100.19", "ash": "198.51.100.35"}
PRIMARY, STANDBY = "frontend-oak", "frontend-elm"
STRANGER = "203.0.113.68"
SOURCES = (
    "/plugins/managesieve/config.inc.php",
    "/plugins/posthorn/state.php",
    "/plugins/managesieve/localization/en_US.inc",
    "/skins/elastic/templates/login.html",
    "/skins/elastic/meta.json",
)
"""What Roundcube is made of, in folders of which a browser needs the rest."""


def log_in(window: Browser, lab: Lab, user: str, password: str = "") -> None:
    """Logs in as ``user``, which may be an address when a password is said."""
    window.open(f"https://{NAME}/")
    window.type("#rcmloginuser", user)
    window.type("#rcmloginpwd", password or lab.state.passwords[user])
    window.click("#rcmloginsubmit")


def inbox(window: Browser) -> None:
    window.wait(lambda: window.shows("#mailboxlist"))


def create(window: Browser, path: str, frame: str, field: str) -> None:
    """Goes to a page, has it show the form for something new, and goes into the frame of that form."""
    window.open(f"https://{NAME}/?{path}")

    def shown() -> bool:
        # A button that is clicked before its page is ready does nothing.
        window.frame(None)
        window.click("a.create")
        window.frame(frame)
        return bool(window.wait(lambda: window.shows(field), 3))

    window.wait(shown)


@pytest.fixture(scope="module")
def since() -> str:
    """When these tests began, as journalctl wants it."""
    return f"@{time.time():.0f}"


@pytest.fixture(scope="module")
def window(lab: Lab, since: str) -> Iterator[Browser]:
    """A browser in which ann is logged in."""
    assert shutil.which("chromedriver"), "chromedriver is missing: tools/setup.py --browser installs it"
    with browser(lab.state) as opened:
        log_in(opened, lab, "ann")
        inbox(opened)
        yield opened


# Who gets there, and how


@pytest.mark.parametrize("name", [NAME, "webmail.net.hill.example"])
def test_whoever_comes_in_clear_is_sent_to_tls(lab: Lab, name: str) -> None:
    for address in FRONT_ENDS.values():
        said = lab.client("web", server=name, address=address, tls=False, path="/?_task=mail")
        assert (said["status"], said["headers"]["location"]) == (301, f"https://{NAME}/?_task=mail")


@pytest.mark.parametrize("site", FRONT_ENDS)
def test_a_user_is_let_in_at_every_front_end_and_a_stranger_at_none(lab: Lab, site: str) -> None:
    request = {"server": NAME, "address": FRONT_ENDS[site]}
    welcome = lab.client("web", **request, source="203.0.113.80")
    assert welcome["status"] == 200 and "rcmloginuser" in welcome["text"]
    assert welcome["protocol"] == "h2"
    stranger = lab.client("web", **request, source=STRANGER, path="/?_task=login")
    assert (stranger["status"], stranger["headers"]["location"]) == (302, "https://www.hill.example/")
    assert "roundcube" not in stranger["text"].lower()


def test_browsers_are_told_to_be_careful(lab: Lab) -> None:
    headers = lab.client("web", server=NAME)["headers"]
    assert headers["strict-transport-security"].startswith("max-age=31536000")
    assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    cookie = headers["set-cookie"].lower()
    assert all(word in cookie for word in ("secure", "httponly", "samesite"))
    assert "PHP" not in str(headers) and not re.search(r"nginx/[0-9]", str(headers))


@pytest.mark.parametrize(
    "path", ["/config/config.inc.php", "/temp/", "/logs/", "/installer/", "/SQL/", "/.htaccess", *SOURCES]
)
def test_only_what_is_for_browsers_is_served(lab: Lab, path: str) -> None:
    assert lab.client("web", server=NAME, path=path)["status"] in (403, 404)


def test_browsers_get_styles_and_scripts(lab: Lab) -> None:
    for path in (
        "/skins/elastic/styles/styles.min.css",
        "/program/js/common.min.js?s=1",
        "/skins/elastic/watermark.html",
    ):
        assert lab.client("web", server=NAME, path=path)["status"] == 200, path


def test_nobody_but_the_front_ends_speaks_to_roundcube_itself(lab: Lab) -> None:
    script = "import socket; socket.create_connection(('198.18.1.14', 8443), 5)"
    assert lab.run("smtp-in-oak", "python3", "-c", script).returncode != 0
    assert lab.run("frontend-ash", "python3", "-c", script).returncode == 0


def test_no_secret_of_the_web_mail_can_be_read_by_nginx(lab: Lab) -> None:
    for file in ("/etc/posthorn/webmail/session-key", "/var/lib/webmail/webmail.db"):
        done = lab.run(PRIMARY, "runuser", "-u", "www-data", "--", "cat", file)
        assert done.returncode != 0 and "denied" in done.stderr


# A user's day


def test_a_wrong_password_is_told(lab: Lab) -> None:
    with browser(lab.state) as other:
        log_in(other, lab, "ann", "wrong")
        assert other.text("#messagestack .error, #messagestack .warning") == "Login failed."


def test_who_logs_in_by_an_address_finds_the_mailbox_of_its_account(lab: Lab) -> None:
    token = secrets.token_hex(6)
    foreign.send(lab.state, sender="bob@far.example", to="ann@hill.example", subject=f"Which {token}", text="Hello\n")
    with browser(lab.state) as other:
        log_in(other, lab, "Info@hill.example", lab.state.passwords["ann"])
        inbox(other)

        def arrived() -> bool:
            other.open(f"https://{NAME}/?_task=mail")
            return f"Which {token}" in other.text("#messagelist tbody")

        other.wait(arrived, 40)
        other.open(f"https://{NAME}/?_task=mail&_action=compose")
        offered = other.run("return [...document.querySelector('#_from').options].map(each => each.text)")
        assert any("<ann@hill.example>" in address for address in offered)


def test_an_address_of_several_lets_nobody_into_the_web_mail(lab: Lab) -> None:
    with browser(lab.state) as other:
        log_in(other, lab, "sales@hill.example", lab.state.passwords["ann"])
        assert other.text("#messagestack .error, #messagestack .warning") == "Login failed."


def test_a_mail_is_read_and_answered(lab: Lab, window: Browser) -> None:
    token = secrets.token_hex(6)
    foreign.send(lab.state, sender="bob@far.example", to="ann@hill.example", subject=f"Party {token}", text="Come!\n")
    answer = f"{token}: thank you"
    row = "#messagelist tbody tr td.subject"

    def arrived() -> bool:
        window.open(f"https://{NAME}/?_task=mail")
        window.wait(lambda: window.shows("#messagelist tbody tr"), 5)
        return f"Party {token}" in window.text(row)

    window.wait(arrived, 40)
    window.click(row)
    window.frame("#messagecontframe")
    assert "Come!" in window.text("#messagebody")
    window.frame(None)
    window.click("a.reply")
    window.wait(lambda: window.shows("#composebody"))
    window.run("const body = document.querySelector('#composebody'); body.value = arguments[0] + body.value", answer)
    window.click("button.send, a.send")
    window.wait(lambda: "compose" not in window.url)

    def received() -> str | None:
        return next((mail for mail in foreign.mails(lab.state) if answer in mail), None)

    mail = eventually(received)
    for result in ("spf=pass", "dkim=pass", "dmarc=pass"):
        assert result in mail
    for told in ("203.0.113.80", "2001:db8:f::80", "Roundcube", "net.hill.example"):
        assert told not in mail
    assert "From: ann <ann@hill.example>" in mail


def test_only_one_s_own_addresses_are_offered_to_write_from(window: Browser) -> None:
    window.open(f"https://{NAME}/?_task=mail&_action=compose")
    window.wait(lambda: window.shows("#_from"))
    offered = window.run("return [...document.querySelector('#_from').options].map(each => each.text)")
    assert offered[0] == "ann <ann@hill.example>"
    assert "ann <info@moor.example>" in offered
    assert not [address for address in offered if "ben" in address or "helpdesk" in address]


def test_a_misspelt_word_is_found(window: Browser) -> None:
    window.open(f"https://{NAME}/?_task=mail&_action=compose")
    window.wait(lambda: window.shows("#composebody"))
    window.run("document.querySelector('#composebody').value = 'A wrod from the garden'")
    window.click("a.spellcheck")
    assert window.text(".googie_link") == "wrod"


@pytest.fixture
def no_filters(lab: Lab) -> None:
    """Ann has no filters, whatever other tests made for her."""
    lab.run("maildrop-oak", "doveadm", "sieve", "deactivate", "-u", "ann")
    for line in lab.run("maildrop-oak", "doveadm", "sieve", "list", "-u", "ann").stdout.splitlines():
        lab.run("maildrop-oak", "doveadm", "sieve", "delete", "-u", "ann", line.split()[0])


def test_a_filter_made_in_the_browser_files_the_next_mail(lab: Lab, window: Browser, no_filters: None) -> None:
    token = secrets.token_hex(4)
    create(window, "_task=settings&_action=plugin.managesieve", "#filter-box", "input[name=_name]")
    window.type("input[name=_name]", f"Orchard {token}")
    window.type("input[name^=_rule_target]", token)
    window.run("document.querySelector('select[name^=_action_mailbox]').value = 'Trash'")
    window.click("button.submit")
    window.frame(None)
    window.wait(lambda: token in window.text("#filterslist"))
    try:
        message_id = foreign.send(lab.state, sender="bob@far.example", to="ann@hill.example", subject=f"Of {token}")
        assert in_mailbox(lab, "ann", message_id, folder="Trash")
    finally:
        window.click("#filterslist tr")
        window.click("a.delete:not(.disabled)")
        window.click(".ui-dialog button.delete")
        window.wait(lambda: not window.shows("#filterslist tr"))


# What users put in


def add_contact(window: Browser, name: str) -> None:
    create(window, "_task=addressbook", "#contact-frame", "#ff_firstname")
    window.type("#ff_firstname", name)
    window.type("#ff_email0", f"{name.lower()}@far.example")
    window.click("button.submit")
    window.frame(None)
    window.wait(lambda: name in window.text("#contacts-table"))


def contacts(window: Browser) -> str:
    window.open(f"https://{NAME}/?_task=addressbook")
    return window.text("#contacts-table tbody")


def logins(lab: Lab, host: str) -> int:
    log = lab.run(host, "journalctl", "-t", "roundcube", "-o", "cat", "-g", "Successful login for ann").stdout
    return len(log.splitlines())


def states(lab: Lab) -> list[str]:
    """The messages in which ann's contacts and settings lie."""
    found = lab.run("maildrop-oak", "doveadm", "fetch", "-u", "ann", "text", "mailbox", "Webmail").stdout
    parts = re.split(r"^text:\n|\x0c\n?", found, flags=re.MULTILINE)
    return [text.strip("\n") + "\n" for text in parts if text.strip()]


def test_contacts_survive_the_loss_of_the_primary_and_what_is_added_meanwhile_survives_its_return(
    lab: Lab, window: Browser
) -> None:
    token = secrets.token_hex(3)
    add_contact(window, f"Paula{token}")
    at_standby = logins(lab, STANDBY)
    with stopped(lab, "webmail", PRIMARY):
        window.open(f"https://{NAME}/")
        window.wait(lambda: window.shows("#rcmloginuser"))
        log_in(window, lab, "ann")
        inbox(window)
        assert logins(lab, STANDBY) == at_standby + 1
        assert f"Paula{token}" in contacts(window)
        add_contact(window, f"Stan{token}")
    # Who is logged in at the standby stays there; who comes anew is at the primary, as soon as it is asked again.
    assert f"Stan{token}" in contacts(window)

    def at_primary() -> bool:
        before = logins(lab, PRIMARY)
        with browser(lab.state) as other:
            log_in(other, lab, "ann")
            inbox(other)
            listed = contacts(other)
        assert f"Paula{token}" in listed and f"Stan{token}" in listed
        return logins(lab, PRIMARY) > before

    eventually(at_primary)


def test_two_states_in_a_mailbox_become_one_and_a_forged_one_is_none(lab: Lab, window: Browser) -> None:
    (older,) = states(lab)
    token = secrets.token_hex(3)
    add_contact(window, f"Olga{token}")
    forged = older.replace("X-Posthorn-Seal: ", "X-Posthorn-Seal: 00")
    # As versions before this one wrote it.
    oldest = re.sub(r"(X-Posthorn-Seal: )[0-9a-f]{64}\s+", r"\1", older)
    assert oldest != older
    # As replication leaves them, when both mailbox hosts were written to.
    for text in (older, forged, oldest):
        lab.run("maildrop-oak", "doveadm", "save", "-u", "ann", "-m", "Webmail", text=text)
    assert f"Olga{token}" in contacts(window)
    left = states(lab)
    assert len(left) == 2 and forged in left and older not in left and oldest not in left
    lab.run("maildrop-oak", "doveadm", "expunge", "-u", "ann", "mailbox", "Webmail", "header", "X-Posthorn-Seal", "00")


STRANGERS = r"""<?php
require '/var/lib/roundcube/plugins/posthorn/state.php';
class Rc {
    public $storage;
    function get_storage() { return $this->storage; }
    function get_user_name() { return 'ann'; }
    public $config;
}
class Config { function get($name) { return 'a key'; } }
class Found { public $uids; function get() { return $this->uids; } }
class Storage {
    public $mails = [], $read = 0;
    function check_connection() { return true; }
    function folder_exists($name) { return true; }
    function get_folder() { return 'INBOX'; }
    function set_folder($name) {}
    function search_once($folder, $criteria) {
        preg_match('/(SUBJECT "(.+)" .* NOT )?HEADER X-Posthorn-Seal (\S+)$/', $criteria, $wanted);
        $has = fn ($mail, $text) => strpos($mail, $text) !== false;
        $known = fn ($mail) => $has($mail, $wanted[3]);
        $old = fn ($mail) => $has($mail, $wanted[2]) && $has($mail, 'X-Posthorn-Seal') && !$known($mail);
        $found = new Found();
        $found->uids = array_keys(array_filter($this->mails, $wanted[1] ? $old : $known));
        return $found;
    }
    function get_raw_body($uid) { $this->read++; return $this->mails[$uid]; }
}
$rc = new Rc();
[$rc->storage, $rc->config] = [new Storage(), new Config()];
$state = (new ReflectionClass('posthorn_state'))->newInstanceWithoutConstructor();
$property = new ReflectionProperty($state, 'rc');
$property->setAccessible(true);
$property->setValue($state, $rc);
function call($name, ...$arguments) {
    $method = new ReflectionMethod('posthorn_state', $name);
    $method->setAccessible(true);
    return $method->invokeArgs($GLOBALS['state'], $arguments);
}
$ahead = (int) (microtime(true) * 1000) + 3600000;
$records = ['contacts:1' => ['time' => $ahead, 'data' => ['email' => 'old@far.example']]];
$rc->storage->mails = [
    1 => "Subject: Hello\r\n\r\n" . str_repeat('x', 1000),
    2 => "X-Posthorn-Seal: " . str_repeat('0', 64) . ' ' . str_repeat('1', 64) . "\r\n\r\nx",
    3 => call('sealed', $records),
];
$found = call('in_mailbox');
$read = $rc->storage->read;
// As versions before this one wrote it; and many that strangers made to look like it.
$older = preg_replace('/(X-Posthorn-Seal: )[0-9a-f]{64} /', '$1', call('sealed', $records));
$forged = preg_replace('/(X-Posthorn-Seal: )[0-9a-f]{64}/', '${1}' . str_repeat('0', 64), $older);
$rc->storage->mails = array_merge(array_fill(0, 20, $forged), [$older]);
$found_older = call('in_mailbox');
$edited = call('since', $records, ['contacts:1' => ['email' => 'new@far.example']]);
$deleted = call('since', $records, []);
echo json_encode([
    'found' => array_keys($found),
    'alike' => $found[3] == $records,
    'read' => $read,
    'older' => array_keys($found_older),
    'older_alike' => $found_older[20] == $records,
    'older_read' => $rc->storage->read - $read,
    'edited' => call('later', $records, $edited)['contacts:1']['data']['email'],
    'deleted' => call('later', $records, $deleted)['contacts:1']['data'],
]);
"""


def test_strangers_mails_cost_little_older_states_count_and_a_clock_ahead_throws_no_change_away(lab: Lab) -> None:
    said = lab.run(PRIMARY, "php", text=STRANGERS)
    assert json.loads(said.stdout) == {
        "found": [3],
        "alike": True,
        "read": 1,
        "older": [20],
        "older_alike": True,
        "older_read": 4,
        "edited": "new@far.example",
        "deleted": None,
    }, said.stdout + said.stderr


def test_a_session_survives_a_restart_and_contacts_survive_the_database(lab: Lab, window: Browser) -> None:
    for host in (PRIMARY, STANDBY):
        lab.run(host, "systemctl", "restart", "webmail", "nginx")

    def still_in() -> bool:
        window.open(f"https://{NAME}/?_task=mail")
        return window.shows("#mailboxlist")

    eventually(still_in)
    listed = contacts(window)
    for host in (PRIMARY, STANDBY):
        script = "systemctl stop webmail; rm /var/lib/webmail/webmail.db*; systemctl start webmail"
        assert lab.run(host, "sh", "-c", script).returncode == 0
    log_in(window, lab, "ann")
    inbox(window)
    assert contacts(window) == listed


def test_an_account_that_is_gone_is_forgotten(lab: Lab) -> None:
    def ask(question: str) -> str:
        done = lab.run(PRIMARY, "runuser", "-u", "webmail", "--", "sqlite3", "/var/lib/webmail/webmail.db", question)
        return str(done.stdout + done.stderr).strip()

    ask("INSERT INTO users (username, mail_host) VALUES ('carl', '127.0.0.1')")
    kept = ask("SELECT count(*) FROM contacts")
    assert ask("SELECT username FROM users WHERE username = 'carl'") == "carl"
    assert lab.run(PRIMARY, "systemctl", "reload", "webmail").returncode == 0
    assert ask("SELECT username FROM users WHERE username = 'carl'") == ""
    assert ask("SELECT count(*) FROM contacts") == kept


def test_users_of_the_web_mail_are_not_throttled_as_one(lab: Lab) -> None:
    script = """import smtplib
for last in range(13):
    smtp = smtplib.SMTP("127.0.0.1", 20587, timeout=10)
    smtp.ehlo("webmail.hill.example")
    print(smtp.docmd("XCLIENT", f"ADDR=203.0.113.{81 + last}")[0])
    smtp.close()
"""
    assert lab.run(PRIMARY, "python3", "-c", script).stdout.split() == ["220"] * 13
    unit = lab.postfix("smtp-out-oak")
    log = lab.run("smtp-out-oak", "journalctl", "-u", unit, "-o", "cat", "--since", "-20s").stdout
    assert "203.0.113.93" in log


def test_mailboxes_and_submission_hear_who_the_user_is(lab: Lab) -> None:
    read = ("journalctl", "-u", "dovecot", "-o", "cat", "-g", "user=<ann>", "-n", "200")
    log = lab.run("maildrop-oak", *read).stdout
    assert re.search(r"rip=(203\.0\.113\.80|2001:db8:f::80), lip=198\.18\.1\.13", log)


def test_the_loss_of_the_primary_host_costs_seconds(lab: Lab) -> None:
    request = {"server": NAME, "address": FRONT_ENDS["ash"], "source": "203.0.113.80"}
    containers.kill(PRIMARY)
    try:
        started = time.monotonic()
        assert lab.client("web", **request)["status"] == 200
        assert time.monotonic() - started < 6
    finally:
        eventually(lambda: containers.leader(lab.state, PRIMARY) is None)
        faults.heal(lab.state, "host", PRIMARY)
        containers.wait_for_ssh(lab.state, {PRIMARY: "198.18.1.14"})
        eventually(lambda: lab.run(PRIMARY, "systemctl", "is-active", "webmail").stdout.strip() == "active")


@pytest.mark.parametrize("host", [PRIMARY, STANDBY])
def test_roundcube_and_its_php_had_nothing_to_complain_of(lab: Lab, window: Browser, since: str, host: str) -> None:
    assert window.complaints() == []
    assert lab.run(host, "systemctl", "start", "roundcube-gc.service").returncode == 0
    read = ("journalctl", "-p", "warning", "-o", "cat", "-t", "roundcube", "-t", "webmail", "-t", "php")
    said = lab.run(host, *read, "--since", since).stdout
    # A wrong password is worth a line.
    assert [line for line in said.splitlines() if "Authentication failed" not in line] == []
