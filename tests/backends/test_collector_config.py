"""Every file of collector-config/: valid, alone and with its options, like the others, in the ConfigMap."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml

from tests.backends.collectors import COMPAT, DISK_QUEUE, FOLDER, KUSTOMIZATION, OPTIONS, otelcol, signals, variants
from tests.peers import build

VARIANTS = pytest.mark.parametrize("variant", variants())
NEEDED = {"LB_HOP_VENDOR_ENDPOINT": "https://otlp.example.com"}
"""What has no default."""


def read(file: str) -> dict[str, Any]:
    """Read one file."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))
    return content


def validate(*files: str, settings: dict[str, str] | None = None) -> str:
    """Return what the Collector finds wrong: nothing."""
    words = [word for file in files for word in ("--config", str(FOLDER / file))]
    done = otelcol("validate", *words, settings=NEEDED | (settings or {}))
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


@pytest.mark.collector
@VARIANTS
def test_valid(variant: str) -> None:
    """The Collector takes each file as it is."""
    assert validate(variant) == ""


@pytest.mark.collector
@VARIANTS
def test_valid_with_disk_queue(variant: str) -> None:
    """Queues on disk are one more file and one setting."""
    assert validate(variant, DISK_QUEUE, settings={"LB_HOP_QUEUE_STORAGE": "file_storage"}) == ""


@pytest.mark.collector
@VARIANTS
def test_valid_with_compatibility(variant: str) -> None:
    """The old counter goes with every file that has metrics, with queues on disk too; others have no way for it."""
    found = validate(variant, COMPAT)
    if "metrics" in signals(variant):
        assert found == ""
        both = {"LB_HOP_QUEUE_STORAGE": "file_storage"}
        assert validate(variant, DISK_QUEUE, COMPAT, settings=both) == ""
    else:
        assert "pipelines::metrics: must have at least one exporter" in found


@pytest.mark.collector
def test_invalid() -> None:
    """The Collector says what is wrong: vendor.yaml has no default for where the vendor is."""
    done = otelcol("validate", "--config", str(FOLDER / "vendor.yaml"))
    assert done.returncode == 1
    assert "at least one endpoint must be specified" in done.stderr


def test_together() -> None:
    """all.yaml is what prometheus.yaml, loki.yaml and tempo.yaml are together."""
    assert merged("prometheus.yaml", "loki.yaml", "tempo.yaml") == read("all.yaml")


def merged(*files: str) -> dict[str, Any]:
    """Merge as the Collector does: maps by their keys, of anything else the last."""

    def merge(first: Any, second: Any) -> Any:  # noqa: ANN401 - YAML
        if isinstance(first, dict) and isinstance(second, dict):
            return first | {key: merge(first[key], value) if key in first else value for key, value in second.items()}
        return second

    content: Any = {}
    for file in files:
        content = merge(content, read(file))
    return dict(content)


@VARIANTS
def test_same_frame(variant: str) -> None:
    """Where agents send, what is refused for want of memory, and what the Collector tells of itself are the same."""
    frame, other = read("all.yaml"), read(variant)
    other["receivers"]["otlp"]["protocols"]["grpc"].pop("keepalive", None)  # a gateway's own
    assert other["receivers"] == frame["receivers"]
    assert other["extensions"] == frame["extensions"]
    assert other["processors"]["memory_limiter"] == frame["processors"]["memory_limiter"]
    assert other["service"]["telemetry"] == frame["service"]["telemetry"]
    pipelines = other["service"]["pipelines"].values()
    for pipeline in pipelines:
        assert pipeline["receivers"] == ["otlp"]
        assert pipeline["processors"][0] == "memory_limiter"
    used = {name for pipeline in pipelines for name in (*pipeline["processors"], *pipeline["exporters"])}
    assert used == {*other["processors"], *other["exporters"]}


@VARIANTS
def test_settings_are_described(variant: str) -> None:
    """Every variable that a file reads is in the comment at its head, with its default; README.md names the file."""
    text = (FOLDER / variant).read_text(encoding="utf-8")
    head = text[: text.index("receivers:")]
    body = text[len(head) :]
    for read_at in body.split("${env:")[1:]:
        name, _, default = read_at.partition("}")[0].partition(":-")
        line = next(line for line in head.splitlines() if line.startswith(f"#   {name} "))
        assert f"default {default}" in line if default else "no default" in line
    assert f"`{variant}`" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.kustomize
def test_config_map() -> None:
    """`kustomize build` makes a ConfigMap with every file, byte for byte."""
    program = build.programs("kustomize")[0]
    done = subprocess.run([program, "build", FOLDER], capture_output=True, text=True, check=True, timeout=60)
    config_map = yaml.safe_load(done.stdout)
    assert config_map["kind"] == "ConfigMap"
    assert config_map["metadata"]["name"].startswith("lb-hop-collector-")
    files = sorted(path for path in FOLDER.glob("*.yaml") if path.name != KUSTOMIZATION)
    assert config_map["data"] == {path.name: path.read_text(encoding="utf-8") for path in files}
    assert {*OPTIONS} < config_map["data"].keys()
