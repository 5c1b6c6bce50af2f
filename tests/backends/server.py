"""A server on the lab's mgmt host: started with a folder of its own, asked over HTTP, gone on exit."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

from tests.lab.waiting import PATIENCE, wait_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.lab import Lab

ANSWER_SECONDS = 60.0
READY_SECONDS = 90.0


class RefusedError(Exception):
    """A server has answered with an error; says to which question, and what."""


class Server:
    """One program that listens on all addresses of mgmt, at `port` for HTTP. Use it as a context.

    It starts when it is made, so that several come up together, and is ready within the context. On exit it is killed
    and its folder removed: what a test wants to know it asks before.
    """

    def __init__(
        self,
        lab: Lab,
        name: str,
        port: int,
        files: Mapping[str, str],
        argv: Sequence[str],
        *,
        ready: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Write `files` into the folder and run `argv` there; `ready` is the path that answers 200 when all is well."""
        self.host = lab.mgmt
        self.name = name
        self.port = port
        self.folder = folder_of(lab, name)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for file, content in files.items():
            (self.folder / file).write_text(content, encoding="utf-8")
        self._ready = ready
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        with (self.folder / "stderr").open("w") as stderr:
            self.process = self.host.popen(
                argv,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=kept | {"GOMEMLIMIT": "256MiB"} | dict(env or {}),
                cwd=self.folder,
            )

    def __enter__(self) -> Self:
        try:
            wait_for(f"{self.name} that is ready", self._is_ready, READY_SECONDS)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """IPv4 address and port, as nodes and other servers of mgmt reach it over HTTP."""
        return f"{self.host.address4}:{self.port}"

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def stop(self) -> None:
        """Kill it and remove what it wrote, unless that was done before."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def get(
        self, path: str, query: Mapping[str, object] | None = None, headers: Mapping[str, str] | None = None
    ) -> Any:  # noqa: ANN401 - JSON
        """Ask over HTTP and read the JSON of the answer; raises RefusedError unless it is 200."""
        target = f"{path}?{urlencode(query)}" if query else path
        self._check_alive()
        status, content = self.request("GET", target, headers=headers)
        if status != HTTPStatus.OK:
            raise RefusedError(f"{self.name} answers {status} to {target}: {content.decode(errors='replace').strip()}")
        return json.loads(content)

    def request(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Ask from inside the namespace; answers status and content."""

        def ask() -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS * PATIENCE)
            try:
                connection.request(method, target, body, dict(headers or {}))
                answer = connection.getresponse()
                return answer.status, answer.read()
            finally:
                connection.close()

        return self.host.in_netns(ask)

    def _check_alive(self) -> None:
        assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.stderr}"

    def _is_ready(self) -> bool:
        self._check_alive()
        try:
            return self.request("GET", self._ready)[0] == HTTPStatus.OK
        except OSError:  # nobody listens yet
            return False


def folder_of(lab: Lab, name: str) -> Path:
    """Say where a server keeps all its files, so that its configuration can name it."""
    return lab.directory / name
