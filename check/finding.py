"""What the check found: values that say what is so, where, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is, the worst first."""

    WRONG = "wrong"
    """Mail is lost, delayed, refused or less safe than the stack says."""
    UNKNOWN = "unknown"
    """It could not be told from here."""
    ADVICE = "advice"
    """Nothing is broken, and it could be better."""
    NOTE = "note"
    """Worth knowing, and nothing to do."""
    GOOD = "good"


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that was looked at. ``area`` groups them, ``where`` is a host, a zone, a domain or a port."""

    area: str
    where: str
    severity: Severity
    what: str
    advice: str = ""
    because: tuple[str, ...] = ()
    """What would explain it, the likeliest first, by the words of `check.causes`."""
    explains: tuple[str, ...] = ()
    """What it would explain, by the same words."""
    cause: str = ""
    """The finding that explains it, as that one is ``told``."""

    @property
    def told(self) -> str:
        """Its place and words."""
        return f"{self.where}: {self.what}"


Findings = Iterator[Finding]
HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Place:
    """An area and a place in it, to speak of."""

    area: str
    where: str

    def good(self, what: str) -> Finding:
        return Finding(self.area, self.where, Severity.GOOD, what)

    def note(self, what: str, advice: str = "") -> Finding:
        return Finding(self.area, self.where, Severity.NOTE, what, advice)

    def better(self, what: str, advice: str) -> Finding:
        return Finding(self.area, self.where, Severity.ADVICE, what, advice)

    def unknown(self, what: str, advice: str, because: tuple[str, ...] = ()) -> Finding:
        return Finding(self.area, self.where, Severity.UNKNOWN, what, advice, because)

    def wrong(self, what: str, advice: str, because: tuple[str, ...] = (), explains: tuple[str, ...] = ()) -> Finding:
        return Finding(self.area, self.where, Severity.WRONG, what, advice, because, explains)


def status(findings: Iterable[Finding]) -> int:
    """The exit status: 0 when all is good, 1 when something is wrong, 2 when something could not be told."""
    counted = Counter(finding.severity for finding in findings)
    return 1 if counted[Severity.WRONG] else 2 if counted[Severity.UNKNOWN] else 0


def age(seconds: float) -> str:
    """A time that passed, in the unit that a person would use."""
    for size, unit in ((DAY, "days"), (HOUR, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(amount: float) -> str:
    """An amount of memory or disk for a person."""
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
