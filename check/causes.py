"""What explains what: a port whose daemon does not run refuses connections for that reason.

A finding names what it would explain, and what would explain it, by words of this module. Each word stands for one
thing that others cannot do without, so a fault never counts as the effect of something it has nothing to do with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from check.finding import Finding, Severity
from model.stack import Host


def record(name: str, kind: str) -> str:
    """No server has records of a kind at a name."""
    return f"record {name} {kind}"


def unreached(host: Host) -> str:
    """A host does not answer at all."""
    return f"host {host.name}"


def unit(host: Host, name: str) -> str:
    """A unit has failed."""
    return f"unit {host.name} {name}"


def service(host: Host, name: str) -> str:
    """A unit of a service does not run."""
    return f"service {host.name} {name}"


def port(host: Host, number: int) -> str:
    """A unit of the service that listens at a port does not run."""
    return f"port {host.name} {number}"


def queue(host: Host) -> str:
    """The file system with Postfix's queue is full."""
    return f"queue {host.name}"


def named(findings: Iterable[Finding]) -> list[Finding]:
    """The same findings: each that another one explains says which, the first cause of all."""
    listed = list(findings)
    explained_by: dict[str, Finding] = {}
    for finding in listed:
        if finding.severity is Severity.WRONG:
            for word in finding.explains:
                explained_by.setdefault(word, finding)

    def first_cause(finding: Finding) -> Finding:
        passed = [finding]
        while cause := next((explained_by[word] for word in passed[-1].because if word in explained_by), None):
            if cause in passed:
                break
            passed.append(cause)
        return passed[-1]

    causes = [first_cause(finding) for finding in listed]
    return [
        finding if cause is finding else replace(finding, cause=cause.told)
        for finding, cause in zip(listed, causes, strict=True)
    ]
