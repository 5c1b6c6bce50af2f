"""From the sources to the topology: what the API server and the VIP file say, taken over in small steps.

The main loop calls `update`; the sources read and parse in threads of their own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from otel_lb_hop.cluster.objects import Kind
from otel_lb_hop.core.topology import ServiceId, Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from otel_lb_hop.cluster.api_source import ApiSource, State
    from otel_lb_hop.cluster.file_source import FileWatcher
    from otel_lb_hop.cluster.objects import Change
    from otel_lb_hop.core.inventory import Inventory
    from otel_lb_hop.core.topology import Topology
    from otel_lb_hop.model import EndpointSlice, Node, Service, Skipped

log = logging.getLogger(__name__)

CHANGES_PER_STEP = 2_000
ENDPOINTS_PER_STEP = 1_500
"""And Services. Some 10 ms of work, so that records are drained in between."""
PATIENCE_NS = 5 * 10**9
"""So long the first Services wait for the first lists of endpoints and nodes; then they are watched without."""


class SourceState(NamedTuple):
    """How a source is: why it does not say what is so now (None if it does), and what a person wants to know of it."""

    error: str | None
    detail: Any


class Feed:
    """Both sources of the topology, either of which may be missing.

    Of the API server nothing is told before its first lists are complete: without that, every Service would have no
    endpoints for a moment and every connection a false reason. If a list does not come, as when a right is missing,
    the Services are watched without it: counting by VIP goes on.
    """

    def __init__(self, file: FileWatcher | None, api: ApiSource | None, inventory: Inventory) -> None:
        self._file = file
        self._api = api
        self._inventory = inventory
        self._services_ns: int | None = None
        self._told: set[str] = set()

    @property
    def begun(self) -> bool:
        """Whether a source has told its VIP ports."""
        return bool(self._told)

    @property
    def complete(self) -> bool:
        """Whether every source has told its VIP ports and endpoints, and all of them are taken over."""
        if self._api and not self._api.states()[Kind.ENDPOINT_SLICES].synced:
            return False
        return self._told == {name for name, source in (("file", self._file), ("api", self._api)) if source}

    @property
    def cluster_uid(self) -> str | None:
        """The uid of the cluster, if the API server told it."""
        return self._api.cluster_uid() if self._api else None

    def update(self, topology: Topology, now_ns: int) -> bool:
        """Take over a part of what is new; answers whether there is more."""
        if self._file:
            content = self._file.take()
            if content is not None:
                topology.replace(content, now_ns)
                self._told.add("file")
                log.info("the VIP file holds %d VIP ports", len(content.vip_ports))
            if self._api is None:
                topology.confirm(self._file.confirmed_ns)
        return self._follow(self._api, topology, now_ns) if self._api else False

    def states(self, topology: Topology, now_ns: int) -> dict[str, SourceState]:
        """Tell how each source is, by the name of the part."""
        states = {}
        if self._file:
            error = self._file.error
            text = None if error is None else str(error)
            states["vips_file"] = SourceState(text, text)
        if self._api:
            kinds = {kind.name.lower(): state for kind, state in self._api.states().items()}
            errors = [f"{name}: {state.error}" for name, state in kinds.items() if state.error is not None]
            errors += [f"{name}: not read yet" for name, state in kinds.items() if not (state.synced or state.error)]
            if kinds["nodes"].synced and topology.own_node is None:
                errors.append(
                    f"no node is called {topology.node_name}, so no endpoint is on this node: is OTEL_LB_HOP_NODE_NAME "
                    "the name of the Node object (spec.nodeName of the pod)?"
                )
            detail = {name: _tell(state, now_ns) for name, state in kinds.items()}
            states["kubernetes"] = SourceState("; ".join(errors) or None, detail)
        return states

    @property
    def skipped(self) -> list[Skipped]:
        """What the API server names that is not watched, and why."""
        return self._inventory.skipped

    def close(self) -> None:
        """End the threads."""
        if self._file:
            self._file.close()
        if self._api:
            self._api.close()

    def _follow(self, api: ApiSource, topology: Topology, now_ns: int) -> bool:
        states = api.states()  # read first: the lists that it calls synced are in what is taken now, or were before
        changes = api.take(CHANGES_PER_STEP)
        self._take_over(changes, topology, now_ns)
        contacts = [state.contact_ns for state in states.values() if state.contact_ns is not None]
        if len(contacts) == len(states):
            topology.confirm(min(contacts))
        if len(changes) == CHANGES_PER_STEP:
            return True
        if not self._may_begin(states, now_ns):
            return False
        self._inventory.doubt_endpoints(doubtful=states[Kind.ENDPOINT_SLICES].error is not None)
        changed = self._inventory.take_changed(ENDPOINTS_PER_STEP)
        if changed:
            topology.update({ServiceId(Source.API, *key): ports for key, ports in changed.items()}, now_ns)
        if not self._inventory.waiting:
            self._told.add("api")
        return self._inventory.waiting

    def _take_over(self, changes: Iterable[Change], topology: Topology, now_ns: int) -> None:
        nodes: dict[str, Node | None] = {}
        for kind, key, value in changes:
            if kind is Kind.SERVICES:
                self._inventory.put_service(key, cast("Service | None", value))
            elif kind is Kind.ENDPOINT_SLICES:
                self._inventory.put_slice(key, cast("EndpointSlice | None", value))
            else:
                nodes[key[1]] = cast("Node | None", value)
        if nodes:
            topology.update_nodes(Source.API, nodes, now_ns)

    def _may_begin(self, states: Mapping[Kind, State], now_ns: int) -> bool:
        if not states[Kind.SERVICES].synced:
            return False
        if self._services_ns is None:
            self._services_ns = now_ns
        if states[Kind.ENDPOINT_SLICES].synced:
            self._inventory.learn_endpoints()
        return now_ns - self._services_ns > PATIENCE_NS or all(state.synced for state in states.values())


def _tell(state: State, now_ns: int) -> dict[str, Any]:
    told = state._asdict()
    contact_ns = told.pop("contact_ns")
    told["stale_seconds"] = None if contact_ns is None else round(max(0, now_ns - contact_ns) / 1e9, 1)
    return told
