"""The firewall: made of the ports that the services of a host say they open, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from model.base import IPAddress, IPNetwork
from model.stack import Host, Stack
from services.render import render
from services.service import Check, File, Listen, Service, Source, Unit

PATH = "/etc/nftables.conf"


def configure(stack: Stack, host: Host, listens: Iterable[Listen]) -> Service:
    """Lets in what services declared, to whom they declared it. Loaded in one step, so that no moment is open."""
    rules = sorted({rule for listen in listens for rule in _rules(stack, listen)})
    return Service(
        name="firewall",
        packages=("nftables",),
        files=(File(PATH, render("firewall/nftables.conf.j2", rules=rules), mode="0644"),),
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
