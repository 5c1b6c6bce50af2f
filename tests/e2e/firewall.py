"""Silence on purpose: packets to a host of the lab that nobody ever hears of again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.lab import Host

TABLE = "inet deaf"


def deafen(host: Host, match: str = "") -> None:
    """Drop what comes in to the host and matches (default: everything)."""
    rules = f"table {TABLE} {{\nchain in {{\ntype filter hook input priority 0\n{match} drop\n}}\n}}\n"
    host.run(["nft", "-f", "-"], text=rules)


def hear(host: Host) -> None:
    """Let everything in again, if it was not so already."""
    host.run(["nft", "-f", "-"], text=f"table {TABLE}\ndelete table {TABLE}\n")
