"""The audit log of an API server: every request, who made it and what became of it. Pure."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable


class Request(NamedTuple):
    """One request; `resource` is plural, with its subresource after a slash; empty for a path that is none."""

    user: str
    agent: str
    verb: str
    resource: str
    namespace: str
    name: str
    path: str
    query: dict[str, str]
    received: datetime
    code: int | None
    """None until the answer has begun."""
    decision: str
    """`allow` or `forbid` by RBAC; empty where it was not asked."""


def requests(lines: Iterable[str]) -> list[Request]:
    """Read the log, in the order the requests came; its several lines about one request are put together."""
    events: dict[str, dict[str, Any]] = {}
    for line in lines:
        event = json.loads(line)
        # The stages of a request follow each other; the last one knows most.
        events[event["auditID"]] = event
    return sorted((_request(event) for event in events.values()), key=lambda request: request.received)


def _request(event: dict[str, Any]) -> Request:
    target = event.get("objectRef", {})
    url = urlsplit(event["requestURI"])
    return Request(
        user=event.get("user", {}).get("username", ""),
        agent=event.get("userAgent", ""),
        verb=event["verb"],
        resource="/".join(filter(None, (target.get("resource"), target.get("subresource")))),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        path=url.path,
        query=dict(parse_qsl(url.query, keep_blank_values=True)),
        received=datetime.fromisoformat(event["requestReceivedTimestamp"]),
        code=event.get("responseStatus", {}).get("code"),
        decision=event.get("annotations", {}).get("authorization.k8s.io/decision", ""),
    )
