"""The rules and alerts that operators load: where they are, their PrometheusRule, and the same in quick motion.

`python -m tests.backends.rule_files` writes deploy/prometheus/operator/prometheusrule.yaml anew, from rules.yaml.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = FOLDER / "rules.yaml"
RULES_TEST = FOLDER / "rules_test.yaml"
OBJECT = FOLDER / "operator" / "prometheusrule.yaml"

_HEAD = """# Made from ../rules.yaml, which says more; change that (python -m tests.backends.rule_files).
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: otel-lb-hop
  labels:
    app.kubernetes.io/name: otel-lb-hop
spec:
"""
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_DURATION = r"(?:\d+(?:ms|[smhdw]))+"
_IN_PROMQL = re.compile(rf"(?<=\[){_DURATION}(?=[\]:])|(?<=:){_DURATION}(?=\])|(?<=\boffset ){_DURATION}\b")
"""A range, the step of a subquery, an offset."""
_DURATIONS_OF_A_RULE = ("for", "keep_firing_for")

Document = dict[str, Any]


def load(path: Path = RULES) -> Document:
    """Read a rule file."""
    document: Document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def rules_of(document: Document) -> Iterator[Document]:
    """Walk over the rules of all groups."""
    for group in document["groups"]:
        yield from group["rules"]


def as_object(text: str) -> str:
    """Make a PrometheusRule of a rule file: the same lines without comments, as its `spec`."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return _HEAD + "".join(f"  {line}\n" if line else "\n" for line in lines)


def in_quick_motion(document: Document, factor: int) -> Document:
    """Divide every duration of the rules by `factor`; all else stays, and the one given is not changed."""
    quick = copy.deepcopy(document)
    for group in quick["groups"]:
        if "interval" in group:
            group["interval"] = _divided(group["interval"], factor)
    for rule in rules_of(quick):
        rule["expr"] = _IN_PROMQL.sub(lambda found: _divided(found[0], factor), rule["expr"])
        for name in _DURATIONS_OF_A_RULE:
            if name in rule:
                rule[name] = _divided(rule[name], factor)
        if "annotations" in rule:
            # Texts ask queries too; and rules may share theirs.
            rule["annotations"] = {
                name: _IN_PROMQL.sub(lambda found: _divided(found[0], factor), text)
                for name, text in rule["annotations"].items()
            }
    return quick


def milliseconds(duration: str) -> int:
    """Read a duration as Prometheus writes it."""
    return sum(int(number) * _UNIT_MS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdw])", duration))


def _divided(duration: str, factor: int) -> str:
    whole, rest = divmod(milliseconds(duration), factor)
    if rest:
        raise ValueError(f"{duration} is no multiple of {factor} ms")
    return f"{whole}ms"


if __name__ == "__main__":
    OBJECT.write_text(as_object(RULES.read_text(encoding="utf-8")), encoding="utf-8")
