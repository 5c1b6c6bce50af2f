"""The files for Grafana: made by their source, sound in themselves, of names that the agent tells."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana import source
from otel_lb_hop import semconv
from otel_lb_hop.export import metrics
from otel_lb_hop.export.points import Instrument, Kind
from tests.backends import grafana
from tests.backends.grafana import All, Json

register_default_plugins()

DASHBOARDS = grafana.dashboards()
BUILT_IN = {
    "__rate_interval",
    "__range",
    "__from",
    "__to",
    "__field",
    "__value",
    "__data",
    "__url_time_range",
    "__all",
    "1",
}
"""What Grafana knows without a variable; $1 is label_replace's."""

WORDS = {"sum", "count", "max", "min", "avg", "topk", "sort_desc", "by", "and", "or", "on", "group_left", "vector"} | {
    "rate",
    "increase",
    "histogram_quantile",
    "label_replace",
    "label_values",
}
UNIT_SUFFIX = {"s": "_seconds", "By": "_bytes", "1": "_ratio"}
COLLECTORS = {
    f"otelcol_{what}_{kind}{suffix}"
    for what in ("receiver_accepted", "receiver_refused", "exporter_sent", "exporter_send_failed")
    for kind in ("log_records", "metric_points", "spans")
    for suffix in ("", "_total")
} | {"otelcol_exporter_queue_size", "otelcol_exporter_queue_capacity", "exporter"}
every_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)


def _prometheus_names(instrument: Instrument) -> set[str]:
    """Name a metric as the Collector's exporters do."""
    name = instrument.name.replace(".", "_") + UNIT_SUFFIX.get(instrument.unit, "")
    if instrument.kind is Kind.HISTOGRAM:
        return {f"{name}_bucket", f"{name}_count", f"{name}_sum"}
    return {f"{name}_total"} if instrument.kind is Kind.COUNTER else {name}


METRICS = {
    name
    for instrument in vars(metrics).values()
    if isinstance(instrument, Instrument)
    for name in _prometheus_names(instrument)
}
ATTRIBUTES = {
    value
    for name, value in vars(semconv).items()
    if re.match(r"(?!METRIC|EVENT|SPAN|SCOPE|SERVICE_NAME|SCHEMA)[A-Z]", name)
}
LABELS = {name.replace(".", "_") for name in ATTRIBUTES} | {"le", "job", "instance", "k8s_cluster_name"}
LABELS.add(semconv.METRIC_OVERFLOW.replace(".", "_"))


def test_the_files_are_what_their_source_makes() -> None:
    """Hold the committed JSON to what `make dashboards` writes."""
    made = {path.name: text for path, text in source.files().items()}
    assert {path.name: path.read_text(encoding="utf-8") for path in source.FOLDER.iterdir()} == made, (
        "run make dashboards"
    )


@every_dashboard
def test_the_types_of_grafana_read_all_that_is_in_a_file(dashboard: Json) -> None:
    """Read and write each file by the types of Grafana: nothing is unknown to them."""
    read = Dashboard.from_json(dashboard)
    assert json.loads(JSONEncoder().encode(read)) == dashboard


def test_the_four_dashboards_have_names_of_their_own() -> None:
    """Name the dashboards so that they clash with nobody else's."""
    assert [*DASHBOARDS] == [f"otel-lb-hop-{name}" for name in ("agents", "node", "overview", "service")]
    assert len({each["title"] for each in DASHBOARDS.values()}) == 4


@every_dashboard
def test_a_dashboard_belongs_to_no_single_grafana(dashboard: Json) -> None:
    """Look for what an export from a running Grafana leaves behind."""
    assert "id" not in dashboard
    assert "version" not in dashboard
    assert dashboard["schemaVersion"] == 41
    assert dashboard["tags"] == ["otel-lb-hop"]
    assert len(dashboard["uid"]) <= 40


@every_dashboard
def test_panels_lie_beside_each_other_on_24_columns(dashboard: Json) -> None:
    """Lay every panel on the grid: no overlap, no gap."""
    places = [(panel["title"], *(panel["gridPos"][side] for side in "xywh")) for panel in dashboard["panels"]]
    for title, x, _, w, h in places:
        assert 0 <= x < x + w <= 24, title
        assert h > 0, title
    for (title, x, y, w, h), (other, x2, y2, w2, h2) in combinations(places, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y, f"{title} lies on {other}"
    for row in {y for _, _, y, _, _ in places}:
        assert sum(w for _, _, y, w, _ in places if y == row) == 24, f"a gap at y={row}"


@every_dashboard
def test_panels_can_be_told_apart(dashboard: Json) -> None:
    """Give every panel an id and a title of its own."""
    ids = [panel["id"] for panel in dashboard["panels"]]
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(set(titles)) == len(titles)


@every_dashboard
def test_a_panel_says_what_it_means_and_why_it_may_be_empty(dashboard: Json) -> None:
    """Ask each panel for a description, a unit, and a word for when it has no data."""
    for panel in grafana.panels(dashboard):
        defaults = panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 40
        assert panel["description"].endswith(".")
        assert len(defaults["noValue"]) > 10
        if panel["datasource"]["type"] == "prometheus":
            assert defaults["unit"]


@every_dashboard
def test_a_panel_asks_a_data_source_that_was_chosen(dashboard: Json) -> None:
    """Name no data source by a uid of some Grafana."""
    for panel in grafana.panels(dashboard):
        kind = panel["datasource"]["type"]
        for asker in (panel, *panel["targets"]):
            assert asker["datasource"] == {"type": kind, "uid": f"${{{kind}}}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == [*"ABCDEFGH"[: len(refs)]]


@every_dashboard
def test_every_variable_that_is_used_exists_and_every_other_is_of_use(dashboard: Json) -> None:
    """Compare the variables that are named with those that there are."""
    text = json.dumps(dashboard)
    used = {match[1] or match[2] for match in re.finditer(r"\$(\w+)|\$\{(\w+)", text)}
    defined = grafana.variables(dashboard)
    assert used - BUILT_IN == defined.keys()
    for name in ("prometheus", "loki", "tempo"):
        assert (defined[name]["type"], defined[name]["query"]) == ("datasource", name)
    for variable in defined.values():
        if variable["type"] == "query":
            assert variable["datasource"] == {"type": "prometheus", "uid": "${prometheus}"}


@every_dashboard
def test_a_query_names_what_the_agent_tells(dashboard: Json) -> None:
    """Hold every metric, label and attribute to the contract."""
    for target in grafana.targets(dashboard):
        if target.source == "prometheus":
            assert _unknown_names(target.text) == set()
        elif target.source == "loki":
            assert _unknown_fields(target.text) == set()
        else:
            assert {*re.findall(r"(?:span|resource)\.([a-z0-9_.]+)", target.text)} <= ATTRIBUTES


CHOSEN = {
    "otel-lb-hop-overview": {
        'k8s_namespace_name=~"$namespace"',
        'k8s_service_name=~"$service"',
        'otel_metric_overflow=""',
    },
    "otel-lb-hop-service": {
        'k8s_namespace_name="$namespace"',
        'k8s_service_name="$service"',
        'server_address=~"$vip"',
    },
    "otel-lb-hop-node": {'k8s_node_name="$node"', 'otel_metric_overflow=""'},
    "otel-lb-hop-agents": {'k8s_node_name=~"$node"'},
}
CLUSTER = 'k8s_cluster_name=~"$cluster"'
OF_ALL = {
    "Nodes without an agent": {"lb_hop_cluster_nodes", "lb_hop_vip_ports"},
    "Agents and nodes": {"lb_hop_cluster_nodes", "lb_hop_vip_ports"},
    "Share of all nodes": {"lb_hop_connections_total"},
    "Taken in, by VIP": {"lb_hop_connections_total"},
    "CPU of the agents": {"lb_hop_vip_ports"},
    "Memory of the agents": {"lb_hop_vip_ports"},
}
MARKED = {"CPU of the agents", "Memory of the agents"}
"""Panels that take a metric as a mark only."""
"""Panels that mean more than what was chosen, and the metrics that they take of all: as a whole, or as a mark."""


@every_dashboard
def test_a_query_keeps_to_what_was_chosen(dashboard: Json) -> None:
    """Look for the variables in every selector: a part of another whole would still look like a share."""
    for target in grafana.targets(dashboard):
        text = re.sub(r'"(?:\\.|[^"])*"', lambda quoted: quoted[0] if "$" in quoted[0] else '""', target.text)
        of_all = set()
        for metric, matchers in re.findall(r"\b(lb_hop_\w+|process_\w+)(?:\{(.*?)\})?(?=[\[ )]|$)", text):
            assert metric not in METRICS or CLUSTER in matchers or target.panel in MARKED, target.key
            if metric in METRICS and not CHOSEN[target.dashboard] <= {*matchers.split(", ")}:
                of_all.add(metric)
        if target.source == "prometheus":
            assert of_all <= OF_ALL.get(target.panel, set()), target.key


@every_dashboard
def test_a_variable_asks_for_what_the_agent_tells(dashboard: Json) -> None:
    """Hold the queries of variables to the contract as well."""
    for variable in grafana.variables(dashboard).values():
        if variable["type"] == "query":
            assert _unknown_names(variable["query"]["query"]) == set()


def test_a_name_that_the_agent_does_not_tell_is_found() -> None:
    """Prove that a name with a slip is found."""
    assert _unknown_names('sum by (k8s_nod_name) (rate(lb_hop_conections_total{le="x"}[$__rate_interval]))') == {
        "k8s_nod_name",
        "lb_hop_conections_total",
    }


@every_dashboard
def test_a_graph_rates_over_grafanas_interval_and_a_table_counts_over_the_time_shown(dashboard: Json) -> None:
    """Look at every window: none is fixed, none is of the wrong kind."""
    for target in grafana.targets(dashboard):
        windows = re.findall(r"(\w+)\((?:[^()]|\$\{\w+\})*?\[(.*?)\]\)", target.text)
        assert len(windows) == target.text.count("[$__")
        assert set(windows) <= {("rate", "$__rate_interval"), ("increase", "$__range")}
        if not target.instant:
            assert "$__range" not in target.text


@every_dashboard
def test_no_interval_is_shorter_than_that_of_the_agents_exports(dashboard: Json) -> None:
    """Keep $__rate_interval, which is made of four of these, over four exports whatever the data source is set to."""
    for panel in grafana.panels(dashboard):
        for target in panel["targets"]:
            if target["datasource"]["type"] == "prometheus":
                assert target["interval"] == "1m"


KEPT = ("prometheus", "loki", "tempo", "cluster")
"""What all dashboards let one choose."""
ONE_ELSEWHERE = {
    name
    for dashboard in DASHBOARDS.values()
    for name, variable in grafana.variables(dashboard).items()
    if variable["type"] == "query" and not variable.get("multi")
}


@every_dashboard
def test_links_lead_to_dashboards_that_are_there_and_take_along_what_was_chosen(dashboard: Json) -> None:
    """Follow every link: to a dashboard with those variables, or to a query of known fields."""
    paths = [urlsplit(link["url"]).path for link in dashboard["links"]]
    assert {*paths} == {f"/d/{uid}" for uid in DASHBOARDS if uid != dashboard["uid"]}
    several = any(each.get("multi") for name, each in grafana.variables(dashboard).items() if name in ONE_ELSEWHERE)
    for link in dashboard["links"]:
        assert link["keepTime"]
        # Grafana does not check a value that comes by a link: $__all would be the name of the one Service.
        assert link["includeVars"] is not several
        if several:
            assert urlsplit(link["url"]).query.split("&") == [f"${{{name}:queryparam}}" for name in KEPT]
    found = list(_links(dashboard["panels"]))
    assert found
    for link in found:
        assert "%24" not in link["url"], "Grafana would not see a variable there"
        assert ":regex}" not in link["url"], "a backslash of it would be no JSON within the query"
        url = urlsplit(link["url"])
        if url.path == "/explore":
            (panes,) = parse_qs(url.query)["panes"]
            (pane,) = json.loads(panes).values()
            (query,) = pane["queries"]
            assert pane["datasource"] == query["datasource"]["uid"] == f"${{{query['datasource']['type']}}}"
            assert _unknown_fields(query["expr"]) == set()
        else:
            other = DASHBOARDS[url.path.removeprefix("/d/")]
            asked = {name.removeprefix("var-") for name in re.findall(r"var-\w+", url.query)}
            assert asked
            assert asked <= grafana.variables(other).keys()
            for kept in (*(f"${{{name}:queryparam}}" for name in KEPT), "${__url_time_range}"):
                assert kept in link["url"]


@every_dashboard
def test_links_name_labels_and_columns_that_their_panel_has(dashboard: Json) -> None:
    """Look for every label and column that a link uses in the queries of its panel."""
    for panel in grafana.panels(dashboard):
        text = json.dumps([*_links([panel])])
        asked = " ".join(target.get("expr", "") for target in panel["targets"])
        for label in re.findall(r"__field\.labels\.(\w+)", text):
            assert re.search(rf"by \([^)]*\b{label}\b", asked), f"{panel['title']} has no {label}"
        for column in re.findall(r'__data\.fields\[\\+"(.*?)\\+"\]', text):
            (organize,) = (each for each in panel["transformations"] if each["id"] == "organize")
            assert column in organize["options"]["renameByName"].values(), f"{panel['title']} has no {column}"


@every_dashboard
def test_a_tables_columns_are_those_that_its_queries_answer(dashboard: Json) -> None:
    """Compare the columns of each table with the labels that its queries group by."""
    for panel in grafana.panels(dashboard):
        if panel["type"] != "table" or panel["datasource"]["type"] != "prometheus":
            continue
        (organize,) = (each["options"] for each in panel["transformations"] if each["id"] == "organize")
        refs = [target["refId"] for target in panel["targets"]]
        values = ["Value"] if refs == ["A"] else [f"Value #{ref}" for ref in refs]
        labels = [name for name in organize["renameByName"] if not name.startswith("Value")]
        assert organize["indexByName"] == {name: place for place, name in enumerate([*labels, *values])}
        grouped = {
            label
            for target in panel["targets"]
            for labels in re.findall(r"sum by \((.*?)\)", target["expr"])
            for label in labels.split(", ")
        }
        assert {*labels} == grouped, panel["title"]


def test_variables_are_filled_in_as_grafana_does() -> None:
    """Fill in a value, several, one of several, all, and what has to be escaped."""
    values: dict[str, str | list[str] | All] = {
        "service": "web",
        "vip": ["10.0.10.0", "fd00:10::1"],
        "one": ["10.0.10.0"],
        "namespace": All(".*"),
        "quoted": 'a"b\\c',
        "joined": ["prod.eu", "prod.us"],
        "__range": "3600s",
    }
    text = (
        'x{a="$service", b=~"${vip}", c=~"$one", d=~"$namespace", e="$quoted", f="$1", g=~"${joined:pipe}"}[$__range]'
    )
    assert grafana.fill(text, values) == (
        r'x{a="web", b=~"(10\\.0\\.10\\.0|fd00:10::1)", c=~"10\\.0\\.10\\.0", d=~".*", e="a\"b\\c", f="$1"'
        ', g=~"prod.eu|prod.us"}[3600s]'
    )


def test_a_config_map_is_made_of_every_dashboard() -> None:
    """Compare the kustomization with the folder."""
    kustomization = yaml.safe_load((grafana.FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
    assert kustomization["generatorOptions"]["labels"]["grafana_dashboard"] == "1"
    made = {name for each in kustomization["configMapGenerator"] for name in each["files"]}
    assert made == {f"dashboards/{uid}.json" for uid in DASHBOARDS}


def test_data_sources_lead_to_each_other() -> None:
    """Follow the links between logs, traces and metrics."""
    path = grafana.FOLDER / "provisioning" / "datasources" / "otel-lb-hop.yaml"
    sources = {each["uid"]: each for each in yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]}
    assert {uid: each["type"] for uid, each in sources.items()} == {
        "otel-lb-hop-prometheus": "prometheus",
        "otel-lb-hop-loki": "loki",
        "otel-lb-hop-tempo": "tempo",
    }
    trace, node = sources["otel-lb-hop-loki"]["jsonData"]["derivedFields"]
    assert (trace["matcherType"], trace["matcherRegex"], trace["datasourceUid"]) == (
        "label",
        "trace_id",
        "otel-lb-hop-tempo",
    )
    link = urlsplit(node["url"])
    assert link.path.removeprefix("/d/") in DASHBOARDS
    tempo = sources["otel-lb-hop-tempo"]["jsonData"]
    assert tempo["tracesToLogsV2"]["datasourceUid"] == "otel-lb-hop-loki"
    assert tempo["tracesToMetrics"]["datasourceUid"] == "otel-lb-hop-prometheus"
    for tag in tempo["tracesToMetrics"]["tags"]:
        assert tag["key"] in ATTRIBUTES
        assert tag["value"] == tag["key"].replace(".", "_")
    # Grafana takes a single dollar sign for a variable of its environment.
    assert re.findall(r"(?<!\$)\$(?!\$)\S*", path.read_text(encoding="utf-8").replace("$__rate_interval is", "")) == []


def _unknown_names(promql: str) -> set[str]:
    text = re.sub(r'"(?:\\.|[^"])*"|\$\w+|\$\{.*?\}', "", promql)
    return {*re.findall(r"[a-zA-Z_]\w*", text)} - WORDS - METRICS - LABELS - COLLECTORS


def _unknown_fields(logql: str) -> set[str]:
    """Name the fields of log records that nothing makes; in templates as well."""
    made = {*re.findall(r"label_format (\w+)=", logql)}
    known = LABELS | made | {"scope_name", "trace_id", "k8s_namespace_name_extracted", "label_format"}
    templates = {name for template in re.findall(r"\{\{(.*?)\}\}", logql) for name in re.findall(r"\.(\w+)", template)}
    outside = re.sub(r'"(?:\\.|[^"])*"', "", logql)
    return ({*re.findall(r"[a-zA-Z_]\w*", outside)} | templates) - known


def _links(found: Any) -> list[Json]:  # noqa: ANN401 - JSON
    """List the links of panels' fields, wherever they stand."""
    if isinstance(found, list):
        return [link for each in found for link in _links(each)]
    if not isinstance(found, dict):
        return []
    here = found.get("links", []) if "defaults" not in found else []
    if found.get("id") == "links":
        here = found["value"]
    return [*here, *(link for key, each in found.items() if key not in {"links", "value"} for link in _links(each))]
