"""Kubernetes objects for a lab, as a cluster's parts would write them: plain values, to change before use. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_lb_hop.model import is_ipv4, pack_address
from tests.lab.host import POD_NAMESPACE
from tests.lab.layout import REGION

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from tests.cluster.api import Object
    from tests.lab import Node, Pod

FAMILY_NAMES = {4: "IPv4", 6: "IPv6"}


def node(host: Node) -> Object:
    """Write the Node of a lab's node: in a zone of its own, its fabric addresses as InternalIP."""
    labels = {
        "kubernetes.io/hostname": host.name,
        "topology.kubernetes.io/zone": host.zone,
        "topology.kubernetes.io/region": REGION,
    }
    addresses = [("InternalIP", host.address4), ("InternalIP", host.address6), ("Hostname", host.name)]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": host.name, "labels": labels},
        "status": {"addresses": [{"type": kind, "address": address} for kind, address in addresses]},
    }


def port(number: int, *, target: int | str | None = None, protocol: str = "TCP", name: str = "") -> Object:
    """Write one port of a Service; `target` is the pod's port (default: the same) or its name."""
    return {"name": name or f"{protocol.lower()}-{number}", "port": number, "protocol": protocol} | (
        {"targetPort": target} if target else {}
    )


def service(
    name: str,
    ports: Sequence[Object],
    vips: Iterable[str] = (),
    *,
    namespace: str = POD_NAMESPACE,
    policy: str = "Cluster",
    kind: str = "LoadBalancer",
    external_ips: Sequence[str] = (),
    families: Sequence[int] = (4,),
    **spec: Any,  # noqa: ANN401 - any field of a ServiceSpec
) -> Object:
    """Write a Service without selector; `vips` are what its load balancer has given, `spec` is further fields.

    Only one of type LoadBalancer has a status.
    """
    fields: Object = {
        "type": kind,
        "ports": list(ports),
        "ipFamilies": [FAMILY_NAMES[family] for family in families],
        "ipFamilyPolicy": "SingleStack" if len(families) == 1 else "RequireDualStack",
    }
    if kind != "ClusterIP" or external_ips:
        fields["externalTrafficPolicy"] = policy
    if external_ips:
        fields["externalIPs"] = list(external_ips)
    status = {"status": {"loadBalancer": {"ingress": [{"ip": vip} for vip in vips]}}} if kind == "LoadBalancer" else {}
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": fields | spec, **status}


def endpoint(
    pod: Pod, *, family: int = 4, ready: bool = True, serving: bool | None = None, terminating: bool = False
) -> Object:
    """Write one endpoint of a slice; `serving` is as `ready` unless told, as it is but for a terminating pod."""
    return {
        "addresses": [pod.address4 if family == 4 else pod.address6],
        "conditions": {
            "ready": ready,
            "serving": ready if serving is None else serving,
            "terminating": terminating,
        },
        "nodeName": pod.node,
        "zone": pod.zone,
        "targetRef": {"kind": "Pod", "name": pod.name, "namespace": POD_NAMESPACE},
    }


def endpoint_slice(
    service_name: str,
    ports: Sequence[Object],
    endpoints: Sequence[Object],
    *,
    namespace: str = POD_NAMESPACE,
    family: int = 4,
    number: int = 1,
) -> Object:
    """Write an EndpointSlice of a Service; `ports` are the Service's own, told here with their numeric targets."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service_name}-v{family}-{number}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": FAMILY_NAMES[family],
        "ports": [
            {"name": each["name"], "port": each.get("targetPort", each["port"]), "protocol": each["protocol"]}
            for each in ports
        ],
        "endpoints": list(endpoints),
    }


def web(
    name: str,
    vips: Sequence[str],
    pods: Collection[Pod],
    ports: Sequence[Object],
    *,
    namespace: str = POD_NAMESPACE,
    external_ips: Sequence[str] = (),
    **options: Any,  # noqa: ANN401 - as `service` takes them
) -> list[Object]:
    """Write a whole Service: itself, of the families of its VIPs, and a slice of ready pods for each family."""
    families = sorted({4 if is_ipv4(pack_address(vip)) else 6 for vip in (*vips, *external_ips)})
    slices = [
        endpoint_slice(name, ports, [endpoint(pod, family=family) for pod in pods], namespace=namespace, family=family)
        for family in families
    ]
    whole = service(name, ports, vips, namespace=namespace, external_ips=external_ips, families=families, **options)
    return [whole, *slices]
