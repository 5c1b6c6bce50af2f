"""What the tests of alerts share: the rules in quick motion, and what a real Prometheus says of their alerts.

Every duration of the rules is divided by one factor, and so is the time between two samples and how long Prometheus
takes a sample for current.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import yaml

from tests.backends import rule_files
from tests.backends.prometheus import Prometheus
from tests.lab.waiting import TookTooLongError, wait_for

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.lab import Lab

FACTOR = 120
EXPORT_MS = 250
"""Half a minute in quick motion."""
EVALUATION = "500ms"
LOOKBACK = "2500ms"
"""Five minutes in quick motion: what Prometheus takes for current by default."""
SECONDS = 240.0

Alert = tuple[str, ...]
"""Name, severity, and the labels that matter, in the order of `LABELS`."""
LABELS = ("k8s_service_name", "k8s_node_name", "lb_hop_outcome", "error_type", "lb_hop_part", "reason")

NOBODY_THERE: set[Alert] = {("LbHopNoData", "critical")}
"""Before the first agent."""


class Judge:
    """What Prometheus says of the alerts, and has said since the first look."""

    def __init__(self, server: Prometheus) -> None:
        self._server = server
        self.texts: dict[str, set[str]] = {}
        """Summary and description of each alert that was seen firing, by its name."""

    def firing(self) -> set[Alert]:
        """List the alerts that fire now."""
        found = set()
        for alert in self._server.alerts():
            if alert["state"] == "firing":
                texts = alert["annotations"]
                told = f"{texts['summary']}: {texts['description']}"
                self.texts.setdefault(alert["labels"]["alertname"], set()).add(told)
                found.add(_short(alert["labels"]))
        return found

    def ever_fired(self) -> set[Alert]:
        """List the alerts that have fired at any time."""
        fired = self._server.query('last_over_time(ALERTS{alertstate="firing"}[1h])')
        return {_short(sample.labels) for sample in fired}

    def wait_for(self, wanted: set[Alert]) -> None:
        """Wait until each of these has been seen firing; some end by themselves."""
        seen: set[Alert] = set()

        def look() -> bool:
            seen.update(self.firing())
            return wanted <= seen

        try:
            wait_for("alerts", look, SECONDS)
        except TookTooLongError as error:
            error.add_note(f"these did not fire: {sorted(wanted - seen)}; these did: {sorted(seen)}")
            raise

    def wait_for_none(self) -> None:
        """Wait until all have resolved."""
        try:
            wait_for("the end of all alerts", lambda: not self.firing(), SECONDS)
        except TookTooLongError as error:
            error.add_note(f"these go on: {sorted(self.firing())}")
            raise

    def wait_for_answer(self, what: str, promql: str) -> None:
        """Wait until a query answers something."""
        wait_for(what, lambda: self._server.query(promql), SECONDS)

    def problems(self) -> list[str]:
        """List the rules that could not be judged, and why."""
        return [f"{rule['name']}: {rule['lastError']}" for rule in self._server.rules() if rule["health"] == "err"]


class Course(NamedTuple):
    """What was seen, in its order."""

    before: set[Alert]
    texts: dict[str, set[str]]
    """Of alerts that fired, by name."""
    ever: set[Alert]
    problems: list[str]


def _short(labels: dict[str, str]) -> Alert:
    return labels["alertname"], labels["severity"], *(labels[name] for name in LABELS if name in labels)


def judging_server(lab: Lab, folder: Path, thresholds: Mapping[str, float] | None = None) -> Prometheus:
    """Make a Prometheus with the rules in quick motion, and with these thresholds in place of theirs."""
    document = rule_files.in_quick_motion(rule_files.load(), FACTOR)
    for rule in rule_files.rules_of(document):
        if (name := rule.get("record")) and thresholds and name in thresholds:
            rule["expr"] = f"vector({thresholds[name]})"
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return Prometheus(lab, rules=[path], evaluation_interval=EVALUATION, flags=[f"--query.lookback-delta={LOOKBACK}"])
