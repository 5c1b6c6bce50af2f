"""What the dashboards are made of: variables, links, queries, and panels with their usual looks."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeVar
from urllib.parse import quote

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import logs as logs_builders
from grafana_foundation_sdk.builders import loki as loki_builders
from grafana_foundation_sdk.builders import prometheus as prometheus_builders
from grafana_foundation_sdk.builders import tempo as tempo_builders
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    LogsSortOrder,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat, QueryEditorMode
from grafana_foundation_sdk.models.tempo import SearchTableType

from deploy.grafana.promql import quantile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from grafana_foundation_sdk.cog.builder import Builder
    from grafana_foundation_sdk.cog.variants import Dataquery

    AnyPanel = Builder[models.Panel]

TAG = "otel-lb-hop"
OVERVIEW, SERVICE, NODE, AGENTS = (f"{TAG}-{name}" for name in ("overview", "service", "node", "agents"))
TITLES = {
    OVERVIEW: "Load balancer hops / Overview",
    SERVICE: "Load balancer hops / Service",
    NODE: "Load balancer hops / Node",
    AGENTS: "Load balancer hops / Agents",
}

MIN_STEP = "1m"
"""The agent's usual time between two exports. From it Grafana makes $__rate_interval: never under four of them, also
where the data source is set to another interval."""

PROMETHEUS = DataSourceRef("prometheus", "${prometheus}")
LOKI = DataSourceRef("loki", "${loki}")
TEMPO = DataSourceRef("tempo", "${tempo}")

OWN_LOG = '{service_name="otel-lb-hop"} | scope_name="otel_lb_hop.agent"'
RECORDS = '{service_name="otel-lb-hop"} | scope_name="otel_lb_hop"'
SERVICE_NAMESPACE = "{{ or .k8s_namespace_name_extracted .k8s_namespace_name }}"
"""Where Loki keeps the agent's own namespace as a label of the stream, it names the Service's otherwise."""

NAMES = {
    "k8s_namespace_name": "Namespace",
    "k8s_service_name": "Service",
    "server_address": "VIP",
    "server_port": "Port",
    "network_transport": "Transport",
    "k8s_node_name": "Node",
    "destination_k8s_node_name": "To node",
    "lb_hop_hop": "Hop",
    "reason": "Reason",
    "lb_hop_stage": "Stage",
    "lb_hop_signal": "Signal",
    "lb_hop_exporter": "Exporter",
}
"""Columns of tables, in their order."""


class Query(NamedTuple):
    """One PromQL query, and what its series or its column is called."""

    expr: str
    name: str = ""
    """Of a graph: the legend with {{labels}}. Of a table: the title of the column of values."""
    unit: str = ""
    """Of a column, if it is another than the panel's."""


_FRACTIONS = {"p50": 0.5, "p99": 0.99}


class About(NamedTuple):
    """What a person reads of a panel."""

    title: str
    description: str
    """What it means, and what to do about it."""
    empty: str
    """What stands there instead of data where there is none."""


class PanelBuilder(Protocol):
    """What all builders of panels can do."""

    def title(self, title: str) -> Self: ...  # noqa: D102 - Grafana's words
    def description(self, description: str) -> Self: ...  # noqa: D102
    def no_value(self, no_value: str) -> Self: ...  # noqa: D102
    def datasource(self, datasource: DataSourceRef) -> Self: ...  # noqa: D102
    def span(self, w: int) -> Self: ...  # noqa: D102
    def height(self, h: int) -> Self: ...  # noqa: D102
    def with_target(self, target: Builder[Dataquery]) -> Self: ...  # noqa: D102


P = TypeVar("P", bound=PanelBuilder)


def service_link(namespace: str, service: str) -> dashboard.DashboardLink:
    """Link to the Service dashboard with the same data sources and times."""
    return _data_link(
        f"Service {service}",
        f"/d/{SERVICE}?var-namespace={namespace}&var-service={service}&{_CARRIED}",
    )


def node_link(node: str) -> dashboard.DashboardLink:
    """Link to the Node dashboard with the same data sources and times."""
    return _data_link(f"Node {node}", f"/d/{NODE}?var-node={node}&{_CARRIED}")


def field(label: str) -> str:
    """Name a label of the series that was clicked."""
    return f"${{__field.labels.{label}}}"


def cell(label: str) -> str:
    """Name a cell of the row that was clicked."""
    return f'${{__data.fields["{NAMES[label]}"]}}'


def explore_logs(title: str, expr: str) -> dashboard.DashboardLink:
    """Link to log records in Explore."""
    return _explore(title, LOKI, {"expr": expr, "queryType": "range"})


def lost_of(cluster: str, namespace: str, service: str) -> str:
    """Select the log records of a Service's connections that were lost; by regular expressions."""
    return (
        f'{RECORDS} | k8s_cluster_name=~"{cluster}" | error_type!="" | k8s_service_name=~"{service}"'
        f' | label_format k8s_service_namespace="{SERVICE_NAMESPACE}" | k8s_service_namespace=~"{namespace}"'
    )


def make(
    uid: str,
    description: str,
    variables: Sequence[Builder[models.VariableModel]],
    rows: Mapping[str, Sequence[AnyPanel]],
) -> models.Dashboard:
    """Join rows of panels to a dashboard. Ids of panels are their places."""
    cluster = choice(
        "cluster",
        "Cluster",
        "label_values(lb_hop_vip_ports, k8s_cluster_name)",
        "Clusters by the agents' k8s.cluster.name; where it is not set, all is all there is",
        several=True,
    )
    builder = (
        dashboard.Dashboard(TITLES[uid])
        .uid(uid)
        .description(description)
        .tags([TAG])
        .editable()
        .refresh("1m")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .variables([*_data_sources(), cluster, *variables])
        .links([_dashboard_link(other, one_chosen=uid in {SERVICE, NODE}) for other in TITLES if other != uid])
    )
    for title, panels in rows.items():
        builder = builder.with_row(dashboard.Row(title))
        for panel in panels:
            builder = builder.with_panel(panel)
    built = builder.build()
    for number, each in enumerate(built.panels or [], start=1):
        each.id_val = number
    return built


def choice(name: str, label: str, query: str, description: str, *, several: bool = False) -> dashboard.QueryVariable:
    """Let the operator choose among values of a label in Prometheus."""
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(PROMETHEUS)
        .query({"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_ASC)
    )
    if several:
        everything = models.VariableOption(selected=True, text=["All"], value=["$__all"])
        variable = variable.multi(multi=True).include_all(include_all=True).all_value(".*").current(everything)
    return variable


def entry(name: str, label: str, default: str, description: str) -> dashboard.TextBoxVariable:
    """Let the operator write a value."""
    value = models.VariableOption(selected=True, text=default, value=default)
    return (
        dashboard.TextBoxVariable(name)
        .label(label)
        .description(description)
        .default_value(default)
        .current(value)
        .options([value])
    )


def stat_panel(
    about: About, unit: str, query: str, *, alarm: tuple[float, float] | None = None, w: int = 4
) -> stat.Panel:
    """Show one number; yellow and red from the two figures of `alarm` on."""
    panel = (
        _dress(stat.Panel(), about, PROMETHEUS, w, 4)
        .unit(unit)
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(alarm))
        .with_target(_instant(query, "A"))
    )
    return panel.decimals(2) if unit == "none" else panel


def graph(
    about: About,
    unit: str,
    *queries: Query,
    stacking: StackingMode = StackingMode.NONE,
    alarm: tuple[float, float] | None = None,
    log_scale: bool = False,
    links: Sequence[Builder[models.DashboardLink]] = (),
    w: int = 12,
) -> timeseries.Panel:
    """Show lines over time."""
    panel = (
        _dress(timeseries.Panel(), about, PROMETHEUS, w, 8)
        .unit(unit)
        .line_width(1)
        .fill_opacity(0 if stacking is StackingMode.NONE else 30)
        .stacking(common.StackingConfig().mode(stacking).group("A"))
        .show_points(VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .data_links([*links])
    )
    if log_scale:
        scale = common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    else:
        panel = panel.axis_soft_min(0)
    if alarm:
        style = common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(_thresholds(alarm)).thresholds_style(style)
    for ref, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_query(query.expr, ref).range().legend_format(query.name).interval(MIN_STEP))
    return panel


def times_by_hop(about: About, buckets: str, *matchers: str) -> timeseries.Panel:
    """Show the median and the slowest hundredth of a time in seconds, by hop class."""
    queries = [
        Query(quantile(fraction, buckets, "lb_hop_hop", *matchers), f"{{{{lb_hop_hop}}}} {name}")
        for name, fraction in _FRACTIONS.items()
    ]
    return graph(about, "s", *queries, log_scale=True)


def top(about: About, unit: str, query: Query, *links: Builder[models.DashboardLink], w: int = 12) -> bargauge.Panel:
    """Show bars, one for each series."""
    return (
        _dress(bargauge.Panel(), about, PROMETHEUS, w, 8)
        .unit(unit)
        .min(0)
        .orientation(VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .data_links([*links])
        .with_target(_instant(query.expr, "A").legend_format(query.name))
    )


def listing(
    about: About,
    unit: str,
    labels: str,
    *queries: Query,
    links: Mapping[str, Builder[models.DashboardLink]] | None = None,
    sort_by: str = "",
    w: int = 12,
) -> table.Panel:
    """Show a row for each combination of labels, and a column of values for each query."""
    columns = [name for name in NAMES if name in labels.split(", ")]
    values = {"Value" if len(queries) == 1 else f"Value #{ref}": q for ref, q in zip("ABCDEFGH", queries, strict=False)}
    order = [*columns, *values]
    panel = (
        _dress(table.Panel(), about, PROMETHEUS, w, 8)
        .unit(unit)
        .decimals(0 if unit == "short" else 1)
        .filterable(filterable=True)
        .with_transformation(models.DataTransformerConfig("merge", options={}))
        .with_transformation(
            models.DataTransformerConfig(
                "organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {name: place for place, name in enumerate(order)},
                    "renameByName": {name: NAMES[name] for name in columns}
                    | {name: query.name for name, query in values.items()},
                },
            )
        )
        .sort_by([common.TableSortByFieldState().display_name(sort_by or queries[0].name).desc(desc=True)])
    )
    for ref, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_instant(query.expr, ref).format(PromQueryFormat.TABLE))
        if query.unit:
            panel = panel.override_by_name(query.name, [models.DynamicConfigValue("unit", query.unit)])
    for label, link in (links or {}).items():
        panel = panel.override_by_name(NAMES[label], [models.DynamicConfigValue("links", [link.build()])])
    return panel


def spread(about: About, expr: str, w: int = 12) -> heatmap.Panel:
    """Show a histogram's buckets over time."""
    return (
        _dress(heatmap.Panel(), about, PROMETHEUS, w, 8)
        .unit("si:conn/s")
        .calculate(calculate=False)
        .scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LINEAR))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
        .y_axis(heatmap.YAxisConfig().unit("s").reverse(reverse=False))
        .cell_values(heatmap.CellValues().unit("si:conn/s"))
        .with_target(
            _query(expr, "A").range().format(PromQueryFormat.HEATMAP).legend_format("{{le}}").interval(MIN_STEP)
        )
    )


def states(
    about: About, expr: str, name: str, texts: Mapping[str, tuple[str, str]], w: int = 12
) -> statetimeline.Panel:
    """Show states over time; `texts` has for each value its word and colour."""
    options = {
        value: models.ValueMappingResult(text=text, color=color, index=place)
        for place, (value, (text, color)) in enumerate(texts.items())
    }
    return (
        _dress(statetimeline.Panel(), about, PROMETHEUS, w, 8)
        .unit("none")
        .mappings([models.ValueMap(options)])
        .line_width(0)
        .fill_opacity(70)
        .merge_values(merge_values=True)
        .show_value(VisibilityMode.NEVER)
        .with_target(_query(expr, "A").range().legend_format(name).interval(MIN_STEP))
    )


def log_lines(about: About, expr: str, w: int = 24) -> logs_builders.Panel:
    """Show log records, the newest first, each with its attributes on a click."""
    return (
        _dress(logs_builders.Panel(), about, LOKI, w, 8)
        .show_time(show_time=True)
        .wrap_log_message(wrap_log_message=True)
        .enable_log_details(enable_log_details=True)
        .sort_order(LogsSortOrder.DESCENDING)
        .with_target(
            loki_builders.Dataquery().datasource(LOKI).ref_id("A").expr(expr).query_type("range").max_lines(200)
        )
    )


def traces(about: About, traceql: str, w: int = 24) -> table.Panel:
    """Show traces that a query finds; a trace's id opens it, its name leads to its log record."""
    # On the name: a link on the trace's id would take the place of the data source's own, which opens the trace.
    # Tempo leaves out the zeros that an id begins with.
    to_logs = explore_logs("Log record", f'{RECORDS} | trace_id=~"0*${{__data.fields.traceID}}"').build()
    return (
        _dress(table.Panel(), about, TEMPO, w, 8)
        .filterable(filterable=True)
        .override_by_name("traceName", [models.DynamicConfigValue("links", [to_logs])])
        .with_target(
            tempo_builders.TempoQuery()
            .datasource(TEMPO)
            .ref_id("A")
            .query_type("traceql")
            .query(traceql)
            .table_type(SearchTableType.TRACES)
            .limit(50)
        )
    )


def _dress(panel: P, about: About, source: DataSourceRef, w: int, h: int) -> P:
    return (
        panel.title(about.title)
        .description(about.description)
        .no_value(about.empty)
        .datasource(source)
        .span(w)
        .height(h)
    )


def _query(expr: str, ref: str) -> prometheus_builders.Dataquery:
    query = prometheus_builders.Dataquery().datasource(PROMETHEUS).ref_id(ref).expr(expr)
    return query.editor_mode(QueryEditorMode.CODE)


def _instant(expr: str, ref: str) -> prometheus_builders.Dataquery:
    return _query(expr, ref).instant().interval(MIN_STEP)


def _thresholds(alarm: tuple[float, float] | None) -> dashboard.ThresholdsConfig:
    steps = [models.Threshold(None, "green" if alarm else "text")]
    if alarm:
        steps += [models.Threshold(value, color) for value, color in zip(alarm, ("yellow", "red"), strict=True)]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _data_sources() -> list[Builder[models.VariableModel]]:
    """On all dashboards alike, so that links between them keep what was chosen."""
    return [
        dashboard.DatasourceVariable(kind).label(kind.capitalize()).description(what).type(kind)
        for kind, what in (
            ("prometheus", "Where the agents' metrics are"),
            ("loki", "Where the agents' log records are"),
            ("tempo", "Where the agents' spans are"),
        )
    ]


_KEPT = [f"${{{name}:queryparam}}" for name in ("prometheus", "loki", "tempo", "cluster")]
"""What all dashboards have."""
_CARRIED = "&".join((*_KEPT, "${__url_time_range}"))


def _dashboard_link(uid: str, *, one_chosen: bool) -> dashboard.DashboardLink:
    """Link to a dashboard, with all variables from where one value of each is chosen.

    All or several would stand where one is asked for: Grafana keeps what a link says though it is none of the values.
    """
    carried = "" if one_chosen else "?" + "&".join(_KEPT)
    return (
        dashboard.DashboardLink(TITLES[uid].split(" / ")[1])
        .type(models.DashboardLinkType.LINK)
        .icon("dashboard")
        .url(f"/d/{uid}{carried}")
        .include_vars(include_vars=one_chosen)
        .keep_time(keep_time=True)
    )


def _data_link(title: str, url: str) -> dashboard.DashboardLink:
    return dashboard.DashboardLink(title).url(url)


def _explore(title: str, source: DataSourceRef, query: Mapping[str, str]) -> dashboard.DashboardLink:
    asked = {"refId": "A", "datasource": {"type": source.type_val, "uid": source.uid}, **query}
    pane = {"datasource": source.uid, "queries": [asked], "range": {"from": "${__from}", "to": "${__to}"}}
    # Grafana puts in what ${...} stands for before the browser decodes the rest.
    panes = re.sub(r"%24%7B(.*?)%7D", r"${\1}", quote(json.dumps({"a": pane}), safe=""))
    return _data_link(title, f"/explore?schemaVersion=1&panes={panes}")
