"""Collectors as operators run them: files of collector-config/, settings in the environment."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Self

import yaml

from tests.lab.waiting import PATIENCE, wait_for
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.lab import Host

FOLDER = Path(__file__).parents[2] / "collector-config"
COMPAT, DISK_QUEUE = "compat-lb-inter-node-exporter.yaml", "disk-queue.yaml"
OPTIONS = (COMPAT, DISK_QUEUE)
"""Files that are of use beside another one only."""
KUSTOMIZATION = "kustomization.yaml"
HEALTH_PORT, OWN_METRICS_PORT = 13133, 8888


def variants() -> list[str]:
    """Name every file that is a configuration for itself."""
    return sorted(path.name for path in FOLDER.glob("*.yaml") if path.name not in {*OPTIONS, KUSTOMIZATION})


def signals(variant: str) -> list[str]:
    """Name the signals that a variant takes from agents."""
    return [*yaml.safe_load((FOLDER / variant).read_text(encoding="utf-8"))["service"]["pipelines"]]


def otelcol(*words: str, settings: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of the Collector to its end, with these settings alone."""
    argv = [str(build.build("otelcol")), *words]
    return subprocess.run(argv, env=dict(settings or {}), capture_output=True, text=True, check=False, timeout=60)


class Configured:
    """One Collector on a host of the lab, at `listen`, an address of that host. Use it as a context.

    `files` are names in collector-config/, or paths. `hosts` stands in the place of /etc/hosts, for it alone.
    """

    def __init__(
        self,
        host: Host,
        files: Sequence[str | Path],
        settings: Mapping[str, str] | None = None,
        *,
        listen: str,
        hosts: Path | None = None,
    ) -> None:
        self.listen = listen
        self._host = host
        self._hosts = hosts
        self._files = [FOLDER / file for file in files]
        self._settings = {"LB_HOP_LISTEN": listen, **(settings or {})}
        self.folder = host.directory / f"{Path(files[0]).stem}-{listen}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.process = self._start()

    def __enter__(self) -> Self:
        try:
            return self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> Self:
        """Wait until its health check says that all is well."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the Collector ended with {self.process.returncode}:\n{self.stderr}"
            return self._get(HEALTH_PORT, "/health")[0] == HTTPStatus.OK

        wait_for(f"{self.folder.name} that is well", ready, 60)
        return self

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def own_metric(self, name: str, *parts: str) -> float:
        """Add up a metric of its own over the series whose labels have all these parts; 0 if there is none."""
        return sum(self.page(OWN_METRICS_PORT, name, *parts))

    def page(self, port: int, name: str, *parts: str) -> list[float]:
        """Read the series of a metric, whose labels have all these parts, from the page on one of its ports."""
        return [
            float(line.rpartition(" ")[2])
            for line in self._get(port, "/metrics")[1].splitlines()
            if line.startswith((f"{name}{{", f"{name} ")) and all(part in line for part in parts)
        ]

    def again(self) -> Self:
        """Start it again, after `stop` or `kill`."""
        assert self.process.poll() is not None
        self.process = self._start()
        return self.wait_ready()

    def stop(self) -> None:
        """End it; it sends first what it has."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(30 * PATIENCE)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it by SIGKILL, if it is there."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _start(self) -> subprocess.Popen[str]:
        configs = [word for file in self._files for word in ("--config", str(file))]
        argv = [str(build.build("otelcol")), *configs]
        if self._hosts:
            script = f'mount --bind {self._hosts} /etc/hosts && exec "$@"'
            argv = ["unshare", "--mount", "sh", "-c", script, "sh", *argv]
        environment = {"PATH": os.environ["PATH"], "GOMEMLIMIT": "256MiB", **self._settings}
        with (self.folder / "stderr").open("a") as stderr:
            return self._host.popen(argv, stdout=subprocess.DEVNULL, stderr=stderr, env=environment, cwd=self.folder)

    def _get(self, port: int, path: str) -> tuple[int, str]:
        def ask() -> tuple[int, str]:
            connection = http.client.HTTPConnection(self.listen, port, timeout=10 * PATIENCE)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except OSError:  # nobody listens yet
                return 0, ""
            finally:
                connection.close()

        return self._host.in_netns(ask)
