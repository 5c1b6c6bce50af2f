"""The rules and alerts as files: what Prometheus' own tools say of them, and that all that names them agrees."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from otel_lb_hop import semconv
from tests.backends import rule_files
from tests.peers import build

if TYPE_CHECKING:
    from tests.backends.rule_files import Document

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "alerts.md"
SEVERITIES = {"critical", "warning", "info"}
OF_PROMETHEUS = {"alertname", "alertstate", "__name__", "le"}
OF_OTHERS = {"k8s_cluster_name", "otel_metric_overflow"}
"""A resource attribute that the Collector makes a label, and the attribute of OpenTelemetry's overflow points."""
SUFFIX = re.compile(r"(?:_seconds)?(?:_total|_bucket|_count|_sum)?$")
DURATIONS = re.compile(r"\b(?:\d+(?:ms|[smhdw]))+\b")


@pytest.fixture(scope="module")
def document() -> Document:
    """Read the rules."""
    return rule_files.load()


def _alerts(document: Document) -> list[Document]:
    return [rule for rule in rule_files.rules_of(document) if "alert" in rule]


def _promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program = build.build("prometheus") / "promtool"
    return subprocess.run([str(program), *map(str, words)], text=True, capture_output=True, check=False)


@pytest.mark.prometheus
def test_promtool_finds_no_fault() -> None:
    """Neither an error nor anything its lints know."""
    done = _promtool("check", "rules", "--lint=all", "--lint-fatal", rule_files.RULES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.prometheus
@pytest.mark.timeout(400)
def test_promtool_runs_the_unit_tests() -> None:
    """Each alert fires in time, not before, resolves, and is silent in near misses."""
    done = _promtool("test", "rules", rule_files.RULES_TEST)
    assert done.returncode == 0, done.stdout + done.stderr


# One node of a VIP that is not known for long; with the rules as they are, nothing would be told of it.
LISTED = """
rule_files: [rules.yaml]
evaluation_interval: 1m
tests:
  - name: a VIP of half an hour, on two nodes for the last ten minutes
    interval: 1m
    input_series:
      - series: >-
          lb_hop_endpoints{server_address="10.0.20.1", k8s_node_name="node1", lb_hop_external_traffic_policy="Cluster"}
        values: 1x40
      - series: >-
          lb_hop_endpoints{server_address="10.0.20.1", k8s_node_name="node2", lb_hop_external_traffic_policy="Cluster"}
        values: 1x40
      - series: 'lb_hop_connections_total{server_address="10.0.20.1", k8s_node_name="node1", lb_hop_origin="external"}'
        values: 0+60x40
      - series: 'lb_hop_connections_total{server_address="10.0.20.1", k8s_node_name="node2", lb_hop_origin="external"}'
        values: 0x30 60+60x10
    promql_expr_test:
      - eval_time: 30m
        expr: ALERTS{alertname="LbHopL2VipOnTwoNodes", alertstate="firing"}
      - eval_time: 37m
        expr: ALERTS{alertname="LbHopL2VipOnTwoNodes", alertstate="firing"}
        exp_samples:
          - labels: >-
              ALERTS{alertname="LbHopL2VipOnTwoNodes", alertstate="firing", server_address="10.0.20.1",
              severity="warning"}
            value: 1
"""


@pytest.mark.prometheus
def test_an_l2_vip_that_is_listed_needs_no_history(tmp_path: Path) -> None:
    """Listed as the guide says."""
    line = re.findall(r'`(server_address=~"\S+")`', GUIDE.read_text(encoding="utf-8"))[0]
    rules = rule_files.RULES.read_text(encoding="utf-8")
    assert rules.count('server_address=~""') == 1
    (tmp_path / "rules.yaml").write_text(rules.replace('server_address=~""', line), encoding="utf-8")
    (tmp_path / "rules_test.yaml").write_text(LISTED, encoding="utf-8")
    done = _promtool("test", "rules", tmp_path / "rules_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


# Two nodes that are to have no agent, three with one, one of which leaves the cluster; then one agent is gone.
WITHOUT_AGENT = """
rule_files: [rules.yaml]
evaluation_interval: 1m
tests:
  - name: a control plane without agents
    interval: 1m
    input_series:
      - {series: 'lb_hop_cluster_nodes{k8s_node_name="node1"}', values: 5x20 4x99}
      - {series: 'lb_hop_vip_ports{k8s_node_name="node1"}', values: 8x119}
      - {series: 'lb_hop_vip_ports{k8s_node_name="node2"}', values: 8x59 _x60}
      - {series: 'lb_hop_vip_ports{k8s_node_name="node3"}', values: 8x19 _x100}
    promql_expr_test:
      - eval_time: 59m
        expr: ALERTS{alertname=~"LbHopAgent.+", alertstate="firing"}
      - eval_time: 90m
        expr: count by (alertname, k8s_node_name) (ALERTS{alertname=~"LbHopAgent.+", alertstate="firing"})
        exp_samples:
          - {labels: '{alertname="LbHopAgentGone", k8s_node_name="node2"}', value: 1}
          - {labels: '{alertname="LbHopAgentsMissing"}', value: 1}
"""


@pytest.mark.prometheus
def test_nodes_that_are_to_have_no_agent_are_nobody_missing(tmp_path: Path) -> None:
    """Set as the guide says, for both alerts."""
    setting = "record: cluster:lb_hop_nodes_without_agent:threshold\n        expr: vector(0)"
    rules = rule_files.RULES.read_text(encoding="utf-8")
    assert rules.count(setting) == 1
    (tmp_path / "rules.yaml").write_text(rules.replace(setting, setting.replace("(0)", "(2)")), encoding="utf-8")
    (tmp_path / "rules_test.yaml").write_text(WITHOUT_AGENT, encoding="utf-8")
    done = _promtool("test", "rules", tmp_path / "rules_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_unit_tested(document: Document) -> None:
    """With a moment at which it fires, one at which it does not, and a check of its texts."""
    fires: set[str] = set()
    silent: set[str] = set()
    texts: set[str] = set()
    for test in yaml.safe_load(rule_files.RULES_TEST.read_text(encoding="utf-8"))["tests"]:
        for check in test["promql_expr_test"]:
            name = re.findall(r'alertname="(\w+)"', check["expr"])[0]
            (fires if check.get("exp_samples") else silent).add(name)
        texts |= {check["alertname"] for check in test.get("alert_rule_test", ()) if check["exp_alerts"]}
    names = {alert["alert"] for alert in _alerts(document)}
    assert fires == names
    assert silent == names
    assert texts == names


def test_the_operators_object_says_the_same(document: Document) -> None:
    """It is made of the file."""
    written = rule_files.OBJECT.read_text(encoding="utf-8")
    assert written == rule_files.as_object(rule_files.RULES.read_text(encoding="utf-8"))
    made = yaml.safe_load(written)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == document


def test_kustomizations_name_files_that_exist() -> None:
    """A ConfigMap of the file, and the operator's object."""
    plain = rule_files.load(rule_files.FOLDER / "kustomization.yaml")
    operator = rule_files.load(rule_files.OBJECT.with_name("kustomization.yaml"))
    assert plain["configMapGenerator"] == [{"name": "otel-lb-hop-rules", "files": [rule_files.RULES.name]}]
    assert operator["resources"] == [rule_files.OBJECT.name]


def test_names_are_those_of_the_contract(document: Document) -> None:
    """Every metric and label that a rule asks for is told by the agent, or recorded: in its own group before that."""
    told = {name.replace(".", "_") for name in vars(semconv).values() if isinstance(name, str)}
    own = [{rule["record"] for rule in group["rules"] if "record" in rule} for group in document["groups"]]
    for number, group in enumerate(document["groups"]):
        recorded = set().union(*own[:number], *own[number + 1 :])
        for rule in group["rules"]:
            metrics, labels = _names(rule["expr"])
            for metric in metrics:
                assert metric in recorded or SUFFIX.sub("", metric) in told, (rule, metric)
            assert labels <= told | OF_OTHERS | OF_PROMETHEUS, rule
            if "record" in rule:
                recorded.add(rule["record"])
                assert re.fullmatch(r"[a-z0-9_]+:lb_hop_[a-z0-9_]+:[a-z0-9_]+", rule["record"])


def test_what_is_recorded_is_used(document: Document) -> None:
    """By another rule or an alert."""
    rules = list(rule_files.rules_of(document))
    asked = set().union(*(_names(rule["expr"])[0] for rule in rules))
    assert {rule["record"] for rule in rules if "record" in rule} <= asked


def test_every_alert_says_what_an_operator_needs(document: Document) -> None:
    """Severity, two texts, and the way to its section."""
    for alert in _alerts(document):
        assert alert["labels"].keys() == {"severity"}
        assert alert["labels"]["severity"] in SEVERITIES
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{alert['alert'].lower()}"
        assert alert["alert"].startswith("LbHop")
        assert "for" in alert


def test_the_guide_has_a_section_for_each_alert_and_no_other(document: Document) -> None:
    """Each with its meaning, what users feel, the cause, what to do, how to tune."""
    text = GUIDE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (LbHop\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == {alert["alert"] for alert in _alerts(document)}
    for name, section in sections.items():
        for part in ("**Means.**", "**Users feel.**", "**Find the cause.**", "**Do.**", "**Tune.**"):
            assert part in section, (name, part)


def test_the_guide_tells_every_setting_as_it_is(document: Document) -> None:
    """Names and defaults of the group of settings."""
    (settings,) = (group["rules"] for group in document["groups"] if group["name"] == "lb-hop-settings")
    table = dict(re.findall(r"^\| `([a-z0-9_:]+)` \| ([^|]+) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert table == {
        rule["record"]: found[1] if (found := re.fullmatch(r"vector\((.+)\)", rule["expr"])) else "no VIP"
        for rule in settings
    }


@pytest.mark.prometheus
def test_queries_of_the_guide_can_be_read(tmp_path: Path) -> None:
    """Each as a rule of its own; and their names are the contract's."""
    blocks = re.findall(r"^```promql\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    queries = [line for block in blocks for line in block.splitlines()]
    rules = [{"record": f"query{number}", "expr": query} for number, query in enumerate(queries)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    done = _promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(queries) >= 15


def test_quick_motion_divides_durations_and_nothing_else(document: Document) -> None:
    """Literal cases; and of all rules only durations differ, each by the factor."""
    rule = {
        "expr": "rate(a5m[5m] offset 1h) > 300 and max_over_time(b[1d:30s])",
        "for": "1h30m",
        "labels": {"for": "5m"},
        "annotations": {"description": "5m of {{ query `x[2m]` }}"},
    }
    quick = rule_files.in_quick_motion({"groups": [{"interval": "2m", "rules": [rule]}]}, 60)
    assert quick["groups"][0]["interval"] == "2000ms"
    assert list(rule_files.rules_of(quick)) == [
        {
            "expr": "rate(a5m[5000ms] offset 60000ms) > 300 and max_over_time(b[1440000ms:500ms])",
            "for": "90000ms",
            "labels": {"for": "5m"},
            "annotations": {"description": "5m of {{ query `x[2000ms]` }}"},
        }
    ]
    before = copy.deepcopy(document)
    quick = rule_files.in_quick_motion(document, 120)
    assert document == before
    slow, fast = yaml.safe_dump(document, width=10_000), yaml.safe_dump(quick, width=10_000)
    for old, new in zip(rule_files.rules_of(document), rule_files.rules_of(quick), strict=True):
        durations = DURATIONS.findall(f"{old['expr']} {old.get('for')} {old.get('keep_firing_for')}")
        divided = DURATIONS.findall(f"{new['expr']} {new.get('for')} {new.get('keep_firing_for')}")
        assert [rule_files.milliseconds(each) // 120 for each in durations] == [
            rule_files.milliseconds(each) for each in divided
        ]
        assert DURATIONS.sub("", old["expr"]) == DURATIONS.sub("", new["expr"])
        rest = {"expr", "for", "keep_firing_for", "annotations"}
        assert {k: v for k, v in old.items() if k not in rest} == {k: v for k, v in new.items() if k not in rest}
    assert "[5m]" in slow
    assert "[5m]" not in fast


_WORDS_OF_PROMQL = {
    *("and", "or", "unless", "by", "on", "group_left", "offset"),
    *("avg", "count", "group", "max", "quantile", "sum"),
    *("count_over_time", "last_over_time", "max_over_time", "min_over_time", "quantile_over_time"),
    *("abs", "absent", "increase", "vector"),
}


def _names(promql: str) -> tuple[set[str], set[str]]:
    """List the metrics and the labels that a query asks for."""
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", promql))
    for group in re.findall(r"\b(?:by|on|group_left) \(([^)]*)\)", promql):
        labels |= set(re.findall(r"\w+", group))
    bare = re.sub(r"\{[^}]*\}|\b(?:by|on|group_left) \([^)]*\)|\[[^\]]*\]|\boffset \w+", " ", promql)
    words = {word for word in re.findall(r"[a-z_][\w:]*", bare) if not word.isdigit()}
    return words - _WORDS_OF_PROMQL, labels
