"""Services and EndpointSlices as the API server tells them, joined into VIP ports. Pure.

The join is kube-proxy's: a slice belongs to the Service that its label names, a port of the slice to the Service
port of the same name and protocol (kubernetes pkg/proxy/endpointslicecache.go), and the endpoints of a VIP are those
of its address family. So named, numeric and differing target ports, and Services without a selector, are all one case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_lb_hop.model import Skipped, VipPort, format_address, is_ipv4

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from otel_lb_hop.model import Backend, EndpointSlice, Policy, Service, ServicePort

Key = tuple[str, str]
"""(namespace, name)."""


class Inventory:
    """What is known of every Service, and which of them changed since they were last taken.

    `endpoints_known` says whether the slices have been read at all; until then VIP ports have unknown endpoints.
    """

    def __init__(self, policies: Collection[Policy], *, external_ips: bool) -> None:
        self._policies = policies
        self._external_ips = external_ips
        self._endpoints_known = False
        self._endpoints_doubtful = False
        self._services: dict[Key, Service] = {}
        self._slices: dict[Key, dict[str, EndpointSlice]] = {}
        self._service_of: dict[Key, Key] = {}
        self._skipped: dict[Key, tuple[Skipped, ...]] = {}
        self._changed: dict[Key, None] = {}

    def put_service(self, key: Key, service: Service | None) -> None:
        """Take over a Service; None when it is gone or can be no VIP's."""
        if service is not None:
            self._services[key] = service
        elif self._services.pop(key, None) is None:
            return
        self._changed[key] = None

    def put_slice(self, key: Key, endpoint_slice: EndpointSlice | None) -> None:
        """Take over an EndpointSlice; None when it is gone. It may name another Service than before."""
        before = self._service_of.pop(key, None)
        if before is not None:
            slices = self._slices[before]
            del slices[key[1]]
            if not slices:
                del self._slices[before]
            self._touch(before)
        if endpoint_slice is not None:
            service = (endpoint_slice.namespace, endpoint_slice.service)
            self._slices.setdefault(service, {})[key[1]] = endpoint_slice
            self._service_of[key] = service
            self._touch(service)

    def learn_endpoints(self) -> None:
        """Note that all slices have been read: a Service without any has no endpoints."""
        if not self._endpoints_known:
            self._endpoints_known = True
            self._changed |= dict.fromkeys(self._services)

    def doubt_endpoints(self, *, doubtful: bool) -> None:
        """Note whether slices come in at present; if not, a Service without any may have some all the same."""
        if self._endpoints_doubtful and not doubtful:
            self._changed |= dict.fromkeys(key for key in self._services if key not in self._slices)
        self._endpoints_doubtful = doubtful

    @property
    def waiting(self) -> bool:
        """Whether there are changes to take."""
        return bool(self._changed)

    def take_changed(self, limit: int) -> dict[Key, tuple[VipPort, ...]]:
        """Answer the VIP ports of Services that changed, none for one that is gone.

        It stops at `limit` Services and endpoints together: that is what they cost.
        """
        taken: dict[Key, tuple[VipPort, ...]] = {}
        while self._changed and limit > 0:
            key = next(iter(self._changed))
            del self._changed[key]
            taken[key] = self._join(key)
            limit -= 1 + sum(len(vip_port.backends) for vip_port in taken[key])
        return taken

    @property
    def skipped(self) -> list[Skipped]:
        """Everything that is not watched although it looks like a VIP, by Service."""
        return [each for _, skipped in sorted(self._skipped.items()) for each in skipped]

    def _touch(self, service: Key) -> None:
        if service in self._services:  # most Services of a cluster have no VIP, and many endpoints that change
            self._changed[service] = None

    def _join(self, key: Key) -> tuple[VipPort, ...]:
        self._skipped.pop(key, None)
        service = self._services.get(key)
        if service is None:
            return ()
        skipped = [Skipped(*key, what, reason) for what, reason in service.skipped]
        vips = dict.fromkeys(service.vips)
        if self._external_ips:
            vips |= dict.fromkeys(service.external_ips)
        else:
            left_out = [vip for vip in dict.fromkeys(service.external_ips) if vip not in vips]
            skipped += [Skipped(*key, format_address(vip), "OTEL_LB_HOP_EXTERNAL_IPS is false") for vip in left_out]
        if service.policy not in self._policies:
            skipped += [
                Skipped(*key, format_address(vip), f"OTEL_LB_HOP_POLICY leaves {service.policy} out") for vip in vips
            ]
            vips = {}
        if skipped:
            self._skipped[key] = tuple(skipped)
        if not vips:
            return ()
        slices = [each for _, each in sorted(self._slices.get(key, {}).items())]
        known = self._endpoints_known and (bool(slices) or not self._endpoints_doubtful)
        vip_ports = []
        for port in service.ports:
            backends = _backends(port, slices)
            for vip in vips:
                family = is_ipv4(vip)
                own = tuple(backend for backend in backends if is_ipv4(backend.address) == family)
                vip_ports.append(VipPort(vip, port.port, port.transport, *key, service.policy, own, known))
        return tuple(vip_ports)


def _backends(port: ServicePort, slices: Iterable[EndpointSlice]) -> Iterable[Backend]:
    """Collect a port's endpoints; one that two slices hold, as while it moves between them, counts once."""
    best: dict[tuple[bytes, int], Backend] = {}
    for endpoint_slice in slices:
        for slice_port in endpoint_slice.ports:
            if (slice_port.name, slice_port.transport) != (port.name, port.transport):
                continue
            for backend in slice_port.backends:
                place = backend.address, backend.port
                known = best.get(place)
                if known is None or (backend.ready, backend.serving) > (known.ready, known.serving):
                    best[place] = backend
    return best.values()
