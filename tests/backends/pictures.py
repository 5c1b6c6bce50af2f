"""Pictures for the README, drawn from the query results of the scene: `python -m tests.backends.pictures`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from tests.backends.scene import play

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tests.backends.scene import Scene
    from tests.backends.tempo import Span

FOLDER = Path(__file__).parents[2] / "docs" / "images"
DPI = 120
# Opaque and light, so that it is read on a dark page as on a light one.
PAPER, INK, FAINT = "#fbfbf9", "#22272e", "#8a929c"
COLOR_OF_HOP = {"none": "#3a9d6e", "avoidable": "#d1495b", "required": "#e2a33c"}
WORDS_OF_HOP = {"none": "no hop", "avoidable": "avoidable hop", "required": "required hop"}
COLOR_OF_NODE = {"node1": "#2f6f9f", "node2": "#6aa6cf", "node3": "#b9d6ea"}
LOST = "#5b6068"
SERVICES = ("l2", "dns", "web-local", "web")
"""From the bottom to the top."""


class Share(NamedTuple):
    """One piece of a bar."""

    size: float
    color: str
    label: str


def draw(scene: Scene, folder: Path) -> list[Path]:
    """Draw all pictures into a folder; answers the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _save(_who_takes_what(scene), folder / "who-takes-what.png"),
        _save(_handshakes(scene), folder / "handshake-by-hop.png"),
        _save(_traces(scene), folder / "traces.png"),
    ]


def _who_takes_what(scene: Scene) -> Figure:
    figure = _figure(3.4)
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    counted = _grown(scene, "k8s_service_name", "k8s_node_name")
    fates = _grown(scene, "k8s_service_name", "lb_hop_outcome", "lb_hop_hop")
    for service in SERVICES:
        nodes = [Share(counted.get((service, node), 0), color, node) for node, color in COLOR_OF_NODE.items()]
        _bar(left, service, nodes, "{:.0f}")
        total = sum(size for (name, *_), size in fates.items() if name == service)
        lost = sum(size for (name, outcome, _), size in fates.items() if name == service and outcome != "forwarded")
        hops = [
            Share(fates.get((service, "forwarded", hop), 0) / total, color, WORDS_OF_HOP[hop])
            for hop, color in COLOR_OF_HOP.items()
        ]
        _bar(right, service, [*hops, Share(lost / total, LOST, "lost")], "{:.0%}")
    right.xaxis.set_major_formatter(PercentFormatter(1))
    left.set_title("Connections taken in, by node")
    right.set_title("Did they take an extra hop?")
    for axes in (left, right):
        _legend(axes)
        axes.tick_params(axis="y", length=0)
    left.set_yticks(range(len(SERVICES)), SERVICES)
    return figure


def _handshakes(scene: Scene) -> Figure:
    figure = _figure(3.4)
    axes = figure.subplots()
    for hop, color in COLOR_OF_HOP.items():
        which = f'{{k8s_service_name="web", lb_hop_hop="{hop}"}}'
        rates = f"sum by (le) (increase(lb_hop_handshake_duration_seconds_bucket{which}[{scene.range}]))"
        cumulative = sorted((float(le), size) for (le,), size in _by(scene, rates, "le").items() if le != "+Inf")
        total = max(size for _, size in cumulative)
        (median,) = _by(scene, f"histogram_quantile(0.5, {rates})").values()
        bounds, shares = [bound for bound, _ in cumulative], [size / total for _, size in cumulative]
        # As histogram_quantile() does: evenly within a bucket, which is a curve on this axis.
        between = np.geomspace(bounds[0], bounds[-1], 500)
        axes.plot(between, np.interp(between, bounds, shares), color=color, linewidth=2)
        axes.plot(
            bounds,
            shares,
            color=color,
            linewidth=0,
            marker="o",
            markersize=4,
            label=f"{WORDS_OF_HOP[hop]}: median {median * 1e6:.0f} μs",
        )
        axes.plot([median, median], [0, 0.5], color=color, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(4e-6, 1.2e-3)
    axes.set_ylim(0, 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(_duration))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Handshakes of web that were answered within ...")
    axes.grid(color="#e3e4e1", linewidth=0.7)
    axes.legend(loc="lower right", frameon=False, labelcolor=INK)
    return figure


def _traces(scene: Scene) -> Figure:
    figure = _figure(2.9)
    axes = figure.subplots()
    for place, hop in enumerate(reversed(COLOR_OF_HOP)):
        span = _typical(scene, hop)
        length, facts = (span.end_ns - span.start_ns) / 1e3, span.attributes
        axes.barh(place, length, 0.42, color=COLOR_OF_HOP[hop])
        for name, moment in span.events:
            at = (moment - span.start_ns) / 1e3
            axes.plot([at, at], [place - 0.21, place + 0.21], color=INK, linewidth=1.4)
            axes.annotate(name, (at, place - 0.21), (0, -3), textcoords="offset points", ha="center", va="top", size=8)
        way = (
            f"{facts['client.address']}:{facts['client.port']} → {facts['k8s.node.name']}"
            f" → {facts['destination.k8s.pod.name']}, {WORDS_OF_HOP[hop]}, trace {span.trace_id[:8]}…"
        )
        axes.annotate(way, (0, place + 0.21), (0, 3), textcoords="offset points", va="bottom", size=9)
    axes.set_yticks([])
    axes.set_ylim(-0.6, 2.62)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} μs"))
    axes.set_title("lb_hop default/web: one connection of each class, a span with its events")
    axes.spines["left"].set_visible(False)
    return figure


def _typical(scene: Scene, hop: str) -> Span:
    """Pick the connection with the median length of its class."""
    query = f'{{ span.k8s.service.name = "web" && span.lb_hop.hop = "{hop}" && span.network.type = "ipv4" }}'
    found = scene.tempo.search(query, scene.started, scene.ended)
    spans = [span for each in found for span in scene.tempo.trace(each.trace_id)]
    spans = [span for span in spans if span.attributes["lb_hop.origin"] == "external"]
    return sorted(spans, key=lambda span: span.end_ns - span.start_ns)[len(spans) // 2]


def _by(scene: Scene, promql: str, *labels: str) -> dict[tuple[str, ...], float]:
    found = scene.prometheus.query(promql, scene.at)
    return {tuple(sample.labels.get(label, "") for label in labels): sample.value for sample in found}


def _grown(scene: Scene, *labels: str) -> dict[tuple[str, ...], float]:
    """Count connections from outside: by how much the counters have grown, which is exact."""
    metric = 'lb_hop_connections_total{lb_hop_origin="external"}'
    return _by(scene, f"sum by ({', '.join(labels)}) ({metric} - {metric} offset {scene.range})", *labels)


def _bar(axes: Axes, name: str, shares: list[Share], form: str) -> None:
    start = 0.0
    for share in shares:
        axes.barh(
            SERVICES.index(name), share.size, 0.62, left=start, color=share.color, label=share.label, edgecolor=PAPER
        )
        if share.size > 0.06 * (1 if form.endswith("%}") else 360):
            dark = share.color in {COLOR_OF_NODE["node1"], LOST, COLOR_OF_HOP["avoidable"], COLOR_OF_HOP["none"]}
            axes.text(
                start + share.size / 2,
                SERVICES.index(name),
                form.format(share.size),
                ha="center",
                va="center",
                size=8,
                color=PAPER if dark else INK,
            )
        start += share.size


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(9, height), facecolor=PAPER, layout="constrained")
    figure.text(
        0.995,
        0.012,
        "drawn from the query results of the tests' run: one machine, a hop is a pair of virtual interfaces",
        ha="right",
        size=6.5,
        color=FAINT,
    )
    figure.get_layout_engine().set(rect=(0.005, 0.045, 0.99, 0.945))  # type: ignore[union-attr, call-arg]
    return figure


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(
        once.values(),
        once.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=len(once),
        frameon=False,
        labelcolor=INK,
        fontsize=8,
        handlelength=1,
        columnspacing=1.2,
    )


def _duration(seconds: float, _: int | None) -> str:
    return f"{seconds * 1e6:g} μs" if seconds < 1e-3 else f"{seconds * 1e3:g} ms"


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.set_facecolor(PAPER)
        axes.tick_params(colors=INK, labelsize=8.5)
        axes.title.set(color=INK, fontsize=10.5, fontweight="bold")
        for side, spine in axes.spines.items():
            spine.set_color(FAINT)
            if side in {"top", "right"}:
                spine.set_visible(False)
        for text in axes.texts:
            if text.get_color() == "black":
                text.set_color(INK)
    figure.savefig(path, dpi=DPI)
    return path


def main() -> None:
    """Play the scene and draw."""
    with play() as scene:
        for path in draw(scene, FOLDER):
            print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
