"""Writes the dashboards: `python -m deploy.grafana`."""

from __future__ import annotations

from deploy.grafana.source import write

if __name__ == "__main__":
    write()
