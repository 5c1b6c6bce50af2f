"""Requests to an API server: plain JSON over HTTPS from inside a namespace, as no client library would hide them."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab import Host

Object: TypeAlias = dict[str, Any]

FIELD_MANAGER = "lab"
APPLY = "application/apply-patch+yaml"  # JSON is YAML
MERGE = "application/merge-patch+json"
_PLURALS = {
    "Namespace": ("namespaces", False),
    "Node": ("nodes", False),
    "ClusterRole": ("clusterroles", False),
    "ClusterRoleBinding": ("clusterrolebindings", False),
    "ServiceAccount": ("serviceaccounts", True),
    "Service": ("services", True),
    "EndpointSlice": ("endpointslices", True),
}


class ApiError(Exception):
    """The API server refused; says what was asked and what it said."""


class Answer(NamedTuple):
    """One answer, with the JSON of its body."""

    status: int
    content: Object


class Api:
    """One API server, asked from `host`; the certificate must be of this CA. A connection for each `session`."""

    def __init__(self, host: Host, address: str, port: int, ca: Path) -> None:
        self._host = host
        self._target = (address, port)
        self._ca = ca

    @contextlib.contextmanager
    def session(self, token: str) -> Iterator[Session]:
        """Make requests with this token over one connection; raises OSError when nobody listens."""
        context = ssl.create_default_context(cafile=str(self._ca))
        connection = http.client.HTTPSConnection(*self._target, timeout=30, context=context)
        try:
            self._host.in_netns(connection.connect)
            yield Session(connection, token)
        finally:
            connection.close()


class Session:
    """One connection of one user; not for two threads at once."""

    def __init__(self, connection: http.client.HTTPSConnection, token: str) -> None:
        self._connection = connection
        self._token = token

    def ask(self, method: str, path: str, content: Object | None = None, kind: str = "application/json") -> Answer:
        """Send one request, whatever becomes of it."""
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json"}
        body = None
        if content is not None:
            headers["Content-Type"] = kind
            body = json.dumps(content)
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        return Answer(answer.status, json.loads(text) if text.startswith(b"{") else {"text": text.decode()})

    def want(self, method: str, path: str, content: Object | None = None, kind: str = "application/json") -> Object:
        """Send one request that must succeed; raises ApiError."""
        answer = self.ask(method, path, content, kind)
        if answer.status >= http.HTTPStatus.BAD_REQUEST:
            raise ApiError(f"{method} {path}: {answer.status} {answer.content.get('message', answer.content)}")
        return answer.content

    def apply(self, content: Object) -> None:
        """Make an object be as told, there before or not; its `status` too, if there is one."""
        body = {key: value for key, value in content.items() if key != "status"}
        path = path_of(content)
        self.want("PATCH", f"{path}?fieldManager={FIELD_MANAGER}&force=true", body, APPLY)
        if "status" in content:
            self.want("PATCH", f"{path}/status", {"status": content["status"]}, MERGE)


def path_of(content: Object) -> str:
    """Say where an object lives."""
    metadata = content["metadata"]
    return (
        f"{collection_of(content['apiVersion'], content['kind'], metadata.get('namespace'))}/{quote(metadata['name'])}"
    )


def collection_of(version: str, kind: str, namespace: str | None = None) -> str:
    """Say where the objects of a kind live, of one namespace or of all."""
    plural, namespaced = _PLURALS[kind]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}/namespaces/{quote(namespace)}/{plural}" if namespaced and namespace else f"{root}/{plural}"
