"""Dashboards for Grafana. `python -m deploy.grafana` writes them to `dashboards/`; change them here, never there."""
