"""What was found, for people, for machines, and for Prometheus."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from check.finding import Finding, Severity, status

MARKS = {
    Severity.WRONG: ("✗", "bold red"),
    Severity.UNKNOWN: ("?", "bold yellow"),
    Severity.ADVICE: ("!", "yellow"),
    Severity.NOTE: ("·", "dim"),
    Severity.GOOD: ("✓", "green"),
}
ORDER = ("network", "records", "addresses", "policies", "blocklists", "ports", "between hosts", "hosts", "mailboxes")
RESULTS = {0: "good", 1: "wrong", 2: "unknown"}
WORST = list(Severity)
FOLLOW_AT_MOST = 3
"""So much of what follows from a cause is printed, the rest is counted. The form for machines has all of it."""
PLACE = "\0"
"""Where an advice names the place of its finding."""


def _areas(findings: Sequence[Finding]) -> list[str]:
    return sorted({finding.area for finding in findings}, key=ORDER.index)


def table(name: str, findings: Sequence[Finding], seconds: float) -> RenderableType:
    """A group an area: what is good in one line, all else with what is wrong, where, and what to do."""
    shown = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column(width=1)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    follows: dict[str, list[str]] = {}
    for finding in findings:
        if finding.cause:
            follows.setdefault(finding.cause, []).append(finding.told)
    for area in _areas(findings):
        of_area = [finding for finding in findings if finding.area == area and not finding.cause]
        good = [finding for finding in of_area if finding.severity is Severity.GOOD]
        others = sorted((f for f in of_area if f not in good), key=lambda f: (WORST.index(f.severity), f.where))
        worst = min((f.severity for f in of_area), key=WORST.index, default=Severity.NOTE)
        mark, style = MARKS[Severity.GOOD if worst is Severity.NOTE else worst]
        count = len({finding.where for finding in good})
        said = f"{len(good)} good at {count} place{'s' if count != 1 else ''}" if good else ""
        shown.add_row(Text(mark, style), Text(area, "bold"), Text(said, "green"))
        for finding, places, advice in _together(others, follows):
            mark, style = MARKS[finding.severity]
            text = Text(finding.what)
            if advice:
                text.append(f"\n→ {advice}", "dim")
            for effect in _shortened(follows.get(finding.told, [])):
                text.append(f"\n  {effect}", "dim")
            shown.add_row(Text(mark, style), Text(f"  {places}"), text)
    return Group(shown, Text(), summary(name, findings, seconds))


def _shortened(effects: Sequence[str]) -> list[str]:
    more = len(effects) - FOLLOW_AT_MOST
    shown = [f"so: {effect}" for effect in effects[:FOLLOW_AT_MOST]]
    return [*shown, f"and {more} more"] if more > 0 else shown


def _together(findings: Sequence[Finding], follows: Mapping[str, Sequence[str]]) -> list[tuple[Finding, str, str]]:
    """Findings that say the same of several places, as one: with the first place and how many more there are, and with
    advice that names them all where it names its place."""
    alike: dict[tuple[Severity, str, str], list[Finding]] = {}
    for finding in findings:
        advice = finding.advice.replace(finding.where, PLACE) if finding.where else finding.advice
        # What explains others is told with them, for itself.
        words = finding.told if finding.told in follows else finding.what
        alike.setdefault((finding.severity, words, advice), []).append(finding)
    more = {1: "", 2: " and 1 other"}
    return [
        (
            same[0],
            same[0].where + more.get(len(same), f" and {len(same) - 1} others"),
            advice.replace(PLACE, ",".join(finding.where for finding in same)),
        )
        for (_, _, advice), same in alike.items()
    ]


def summary(name: str, findings: Sequence[Finding], seconds: float) -> Text:
    """The last line, which says it all."""
    counted = Counter(finding.severity for finding in findings if not finding.cause)
    words = {
        Severity.WRONG: "wrong",
        Severity.UNKNOWN: "could not be told",
        Severity.ADVICE: "could be better",
        Severity.GOOD: "good",
    }
    parts = [f"{counted[severity]} {word}" for severity, word in words.items() if counted[severity]]
    if following := sum(bool(finding.cause) for finding in findings):
        parts.insert(1, f"{following} that follow from it")
    style = {0: "bold green", 1: "bold red", 2: "bold yellow"}[status(findings)]
    return Text(f"{name}: {', '.join(parts) or 'nothing was looked at'} ({seconds:.1f} s)", style)


def as_json(name: str, findings: Sequence[Finding], seconds: float) -> str:
    """Everything for a machine: see docs/check.md."""
    counted = Counter(finding.severity for finding in findings)
    document: dict[str, Any] = {
        "stack": name,
        "time": int(time.time()),
        "seconds": round(seconds, 2),
        "result": RESULTS[status(findings)],
        "counts": {severity.value: counted[severity] for severity in Severity},
        "findings": [
            {
                "severity": f.severity.value,
                "area": f.area,
                "where": f.where,
                "what": f.what,
                "advice": f.advice,
                "cause": f.cause,
            }
            for f in findings
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False)


def as_metrics(name: str, findings: Sequence[Finding], seconds: float) -> str:
    """The counts as the textfile collector of Prometheus' node exporter reads them."""
    counted = Counter((finding.area, finding.severity) for finding in findings)
    lines = [
        "# HELP posthorn_check_findings What make check found, by area and severity.",
        "# TYPE posthorn_check_findings gauge",
    ]
    lines += [
        f'posthorn_check_findings{{stack="{name}",area="{area}",severity="{severity.value}"}} {counted[area, severity]}'
        for area in _areas(findings)
        for severity in Severity
    ]
    lines += ["# TYPE posthorn_check_seconds gauge", f'posthorn_check_seconds{{stack="{name}"}} {seconds:.2f}']
    lines += ["# TYPE posthorn_check_time gauge", f'posthorn_check_time{{stack="{name}"}} {time.time():.0f}']
    return "\n".join(lines) + "\n"
