"""The firewall: made of the ports that the services of a host say they open or call, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from model.base import IPAddress, IPNetwork
from model.stack import Host, Stack
from services.render import render
from services.service import Call, Check, File, Listen, Service, Source, Unit

PATH = "/etc/nftables.conf"


def configure(
    stack: Stack, host: Host, listens: Iterable[Listen], calls: Iterable[Call], inside: Iterable[str]
) -> Service:
    """Lets in what services declared, to whom they declared it. Loaded in one step, so that no moment is open."""
    listens = tuple(listens)
    rules = sorted({rule for listen in listens for rule in _rules(stack, listen)})
    return Service(
        name="firewall",
        packages=("nftables",),
        files=(
            File(
                PATH,
                render("firewall/nftables.conf.j2", rules=rules, own=_own(listens, calls), inside=sorted(inside)),
                mode="0644",
            ),
        ),
        units=(Unit("nftables.service", reload_on=(PATH,), once=True),),
        checks=(Check(("nft", "--check", "--file", PATH)),),
    )


def _rules(stack: Stack, listen: Listen) -> Iterable[str]:
    accept = f"{listen.protocol} dport {listen.port} accept"
    if listen.frm is Source.INTERNET:
        yield accept
        return
    sources: tuple[IPAddress | IPNetwork, ...]
    sources = stack.local_prefixes if isinstance(listen.frm, Source) else listen.frm
    for version, word in ((4, "ip"), (6, "ip6")):
        chosen = sorted(str(source) for source in sources if source.version == version)
        if chosen:
            yield f"{word} saddr {{ {', '.join(chosen)} }} {accept}"


def _own(listens: Iterable[Listen], calls: Iterable[Call]) -> list[str]:
    """Who on this host may connect to what on this host. What is open to more than named hosts is open here too."""
    open_to_all = {listen.port for listen in listens if isinstance(listen.frm, Source) and listen.protocol == "tcp"}
    callers: dict[str | None, set[int]] = {None: open_to_all}
    for call in calls:
        callers.setdefault(call.user, set()).add(call.port)
    return [_may(user, ports) for user, ports in sorted(callers.items(), key=lambda item: item[0] or "") if ports]


def _may(user: str | None, ports: Iterable[int]) -> str:
    accept = f"tcp dport {{ {', '.join(map(str, sorted(ports)))} }} accept"
    return f'meta skuid "{user}" {accept}' if user else accept
