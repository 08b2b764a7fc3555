"""Who may log in (logins.lua), run by Lua as in Dovecot's workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lupa.lua54 import LuaRuntime

from model.stack import Stack
from services.bundle import bundle
from services.dovecot import LOGINS, LOGINS_PROGRAM

DOVECOT = """
dovecot = { auth = {
  PASSDB_RESULT_OK = "ok",
  PASSDB_RESULT_USER_UNKNOWN = "unknown",
  PASSDB_RESULT_PASSWORD_MISMATCH = "wrong",
  PASSDB_RESULT_INTERNAL_FAILURE = "failure",
} }
function log_in(name, password)
  local request = { original_user = name }
  function request:log_info() end
  function request:log_error() end
  function request:password_verify(hash, password) return verify(hash, password) end
  local result, more = auth_password_verify(request, password)
  return result, type(more) == "table" and more.user or nil
end
"""


@dataclass
class Logins:
    """A file of logins, whose hashes are passwords behind {X}; and what happens while one is looked at."""

    program: str
    file: Path
    meanwhile: list[Callable[[], object]] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lua: Any = LuaRuntime(unpack_returned_tuples=True)
        self.lua.globals().verify = self.verify
        self.lua.execute(DOVECOT)
        self.lua.execute(self.program.replace(LOGINS, str(self.file)))

    def verify(self, line: str, password: str) -> int:
        self.looked_at.append(line)
        if self.meanwhile:
            self.meanwhile.pop(0)()
        return int(line == "{X}" + password) if line.startswith("{X}") else -1

    def log_in(self, name: str, password: str) -> object:
        return self.lua.globals().log_in(name, password)


@pytest.fixture
def logins(stack: Stack, tmp_path: Path) -> Logins:
    program = bundle(stack, stack.all_hosts["maildrop-oak"])["files"][LOGINS_PROGRAM]["content"]
    made = Logins(program, tmp_path / "logins")
    made.file.write_text("ann:{X}one\nann@hill.example:{X}one::::::user=ann\nben:{BLF-CRYPT}!\ncid:broken\n")
    return made


def test_whoever_logs_in_is_told_what_is_wrong(logins: Logins) -> None:
    assert logins.log_in("ANN", "one") == ("ok", None)
    assert logins.log_in("Ann@Hill.Example", "one") == ("ok", "ann")
    assert logins.log_in("ann", "two") == ("wrong", None)
    assert logins.log_in("dora", "one") == ("unknown", None)
    assert logins.log_in("a", "one") == logins.log_in("ann:{X}one\nben", "!") == ("unknown", None)
    assert logins.log_in("cid", "one") == ("failure", None)


@pytest.mark.parametrize("password", ["", "!", "{BLF-CRYPT}!", "one"])
def test_a_locked_account_has_no_right_password_and_is_no_failure(logins: Logins, password: str) -> None:
    assert logins.log_in("ben", password) == ("wrong", None) and logins.looked_at == []


def test_a_password_that_was_right_when_its_check_began_is_not_when_it_ends(logins: Logins) -> None:
    logins.meanwhile = [lambda: logins.file.write_text("ann:{X}two\n")]
    assert logins.log_in("ann", "one") == ("wrong", None) and logins.looked_at == ["{X}one", "{X}two"]


def test_an_account_that_went_while_its_password_was_checked_is_unknown(logins: Logins) -> None:
    logins.meanwhile = [lambda: logins.file.write_text("ben:{BLF-CRYPT}!\n")]
    assert logins.log_in("ann", "one") == ("unknown", None)


def test_the_new_password_is_right_in_the_moment_of_its_change(logins: Logins) -> None:
    logins.meanwhile = [lambda: logins.file.write_text("ann:{X}two\n")]
    assert logins.log_in("ann", "two") == ("ok", None)
    # Of others' changes it knows nothing.
    logins.meanwhile = [lambda: logins.file.write_text("ann:{X}two\nben:{X}three\n")]
    assert logins.log_in("ann", "two") == ("ok", None) and logins.looked_at[2:] == ["{X}two"]
