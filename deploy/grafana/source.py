"""All dashboards, and how they are written as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import agents, node, overview, service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grafana_foundation_sdk.models.dashboard import Dashboard

FOLDER = Path(__file__).parent / "dashboards"


def dashboards() -> Iterator[Dashboard]:
    """Build every dashboard."""
    for module in (overview, service, node, agents):
        yield module.build()


def files() -> dict[Path, str]:
    """Make the text of every file."""
    encoder = JSONEncoder(indent=2)
    return {FOLDER / f"{each.uid}.json": encoder.encode(each) + "\n" for each in dashboards()}


def write() -> None:
    """Write every file, and remove those of dashboards that are gone."""
    texts = files()
    for path in {*FOLDER.glob("*.json")} - texts.keys():
        path.unlink()
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
