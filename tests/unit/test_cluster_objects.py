"""Objects of the API and the values made of them, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_lb_hop.cluster.objects import Kind, Read, read
from otel_lb_hop.model import (
    Backend,
    EndpointSlice,
    Node,
    Policy,
    Service,
    ServicePort,
    SlicePort,
    Transport,
    pack_address,
)

VIP = bytes(10) + b"\xff\xff\xc6\x33\x64\x07"  # 198.51.100.7
VIP6 = b"\x20\x01\x0d\xb8" + bytes(11) + b"\x07"  # 2001:db8::7
HTTP = {"name": "http", "protocol": "TCP", "port": 80, "targetPort": "web", "nodePort": 30080}
METADATA = {"name": "web", "namespace": "default", "uid": "0f", "resourceVersion": "5", "managedFields": [{"a": {}}]}


def service(*ingress: object, metadata: object = METADATA, **spec: object) -> Read:
    """Read a Service that is of type LoadBalancer unless told otherwise."""
    whole = {"type": "LoadBalancer", "clusterIP": "10.96.0.7", "ports": [HTTP], **spec}
    return read(
        Kind.SERVICES, {"metadata": metadata, "spec": whole, "status": {"loadBalancer": {"ingress": list(ingress)}}}
    )


def value_of(result: Read) -> Service:
    """Give the Service; there must be one, and nothing wrong with it."""
    assert result.problems == ()
    assert isinstance(result.value, Service)
    return result.value


def endpoint_slice(*endpoints: object, **fields: object) -> Read:
    """Read an EndpointSlice of the Service default/web."""
    metadata = {"name": "web-x", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}}
    ports = [{"name": "http", "protocol": "TCP", "port": 8080}]
    raw = {"metadata": metadata, "addressType": "IPv4", "endpoints": list(endpoints), "ports": ports, **fields}
    return read(Kind.ENDPOINT_SLICES, raw)


def backends_of(result: Read) -> tuple[Backend, ...]:
    """Give the endpoints at the only port of a slice."""
    assert isinstance(result.value, EndpointSlice)
    (port,) = result.value.ports
    return port.backends


def endpoint(address: str = "10.1.0.1", **fields: object) -> dict[str, object]:
    """Make an endpoint."""
    return {"addresses": [address], **fields}


def node(labels: object = None, addresses: object = None, **metadata: object) -> Read:
    """Read a node."""
    fields = {"name": "n1", "uid": "0f", "labels": labels, **metadata}
    return read(Kind.NODES, {"metadata": fields, "status": {"addresses": addresses, "images": [{"names": ["a"]}]}})


def test_service() -> None:
    """Everything that is needed of a Service, under its name."""
    result = service({"ip": "198.51.100.7", "ipMode": "VIP"}, {"ip": "2001:DB8:0::7"}, externalTrafficPolicy="Local")
    assert result.key == ("default", "web")
    assert value_of(result) == Service(
        "default", "web", Policy.LOCAL, (VIP, VIP6), (ServicePort("http", 80, Transport.TCP),)
    )


@pytest.mark.parametrize(
    ("ingress", "vips", "skipped"),
    [
        ([{"ip": "198.51.100.7", "ipMode": None}], (VIP,), ()),
        ([{"ip": "198.51.100.7"}, {"ip": "198.51.100.7", "ipMode": "VIP"}], (VIP,), ()),
        ([{"ip": "2001:db8::7"}, {"ip": "198.51.100.7"}], (VIP6, VIP), ()),
        (
            [{"ip": "198.51.100.7", "ipMode": "Proxy"}],
            (),
            (("198.51.100.7", "ipMode Proxy: packets reach the nodes with another destination"),),
        ),
        ([{"hostname": "lb.example.org"}], (), (("lb.example.org", "a host name, not an address"),)),
        ([{"ip": "", "hostname": "lb.example.org"}], (), (("lb.example.org", "a host name, not an address"),)),
        ([{"ip": "198.051.100.7"}], (), (("198.051.100.7", "not an IPv4 or IPv6 address"),)),
        ([{"ip": "fe80::1%eth0"}], (), (("fe80::1%eth0", "not an IPv4 or IPv6 address"),)),
        ([{"ip": 7}], (), (("7", "not an IPv4 or IPv6 address"),)),
        ([{"ip": "\ud800" * 100}], (), (("\\ud800" * 80, "not an IPv4 or IPv6 address"),)),
        ([{"ip": "::ffff:198.51.100.7"}], (VIP,), ()),
    ],
)
def test_ingress(ingress: list[object], vips: tuple[bytes, ...], skipped: tuple[tuple[str, str], ...]) -> None:
    """Each address that the load balancer gave is a VIP, once and in order, or is told with the reason why not."""
    value = value_of(service(*ingress))
    assert (value.vips, value.skipped) == (vips, skipped)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", None])
def test_only_a_load_balancer_has_ingress(kind: str | None) -> None:
    """What is left in the status of a Service that was a load balancer is no VIP."""
    assert service({"ip": "198.51.100.7"}, type=kind) == Read(("default", "web"))


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "LoadBalancer", None])
def test_external_ips(kind: str | None) -> None:
    """Each of externalIPs is a VIP whatever the type, each once."""
    value = value_of(service(type=kind, externalIPs=["198.51.100.7", "2001:db8::7", "198.51.100.7", "x"]))
    assert (value.vips, value.external_ips) == ((), (VIP, VIP6))
    assert value.skipped == (("x", "not an IPv4 or IPv6 address"),)


def test_an_external_ip_that_is_the_load_balancers_too() -> None:
    """One address counts once."""
    value = value_of(service({"ip": "198.51.100.7"}, externalIPs=["198.51.100.7", "2001:db8::7"]))
    assert (value.vips, value.external_ips) == ((VIP,), (VIP6,))


def test_external_name() -> None:
    """kube-proxy does nothing for it."""
    assert service({"ip": "198.51.100.7"}, type="ExternalName", externalIPs=["198.51.100.7"]).value is None


def test_headless() -> None:
    """kube-proxy does nothing for it, which is told."""
    value = value_of(service(type="ClusterIP", clusterIP="None", externalIPs=["198.51.100.7"]))
    assert (value.vips, value.external_ips) == ((), ())
    assert value.skipped == (("198.51.100.7", "the Service is headless"),)


def test_a_load_balancer_without_address() -> None:
    """Nothing is needed of it yet."""
    assert service() == Read(("default", "web"))


@pytest.mark.parametrize(
    ("policy", "read_as"), [("Local", Policy.LOCAL), ("Cluster", Policy.CLUSTER), (None, Policy.CLUSTER)]
)
def test_policy(policy: str | None, read_as: Policy) -> None:
    """The default is Cluster."""
    assert value_of(service({"ip": "198.51.100.7"}, externalTrafficPolicy=policy)).policy is read_as


@pytest.mark.parametrize(
    ("port", "ports"),
    [
        ({"port": 80}, (ServicePort("", 80, Transport.TCP),)),
        ({"name": "dns", "port": 53, "protocol": "UDP"}, (ServicePort("dns", 53, Transport.UDP),)),
        ({"name": "s", "port": 65535, "protocol": "SCTP"}, (ServicePort("s", 65535, Transport.SCTP),)),
        ({"port": 80, "protocol": "QUIC"}, ()),
    ],
)
def test_service_port(port: object, ports: tuple[ServicePort, ...]) -> None:
    """Name and protocol have defaults; a protocol that nobody knows is passed over."""
    assert value_of(service({"ip": "198.51.100.7"}, ports=[port])).ports == ports


@pytest.mark.parametrize("port", [{"port": 65536}, {"port": -1}, {"port": True}, {"port": "80"}, {"port": 8.5}, 80])
def test_a_bad_port(port: object) -> None:
    """It is told, the others are read."""
    result = service({"ip": "198.51.100.7"}, ports=[port, HTTP])
    assert isinstance(result.value, Service)
    assert result.value.ports == (ServicePort("http", 80, Transport.TCP),)
    assert len(result.problems) == 1
    assert result.problems[0].startswith("spec.ports: port: read ")


@pytest.mark.parametrize(
    ("kind", "raw", "result"),
    [
        (Kind.SERVICES, None, Read(None, None, ("services: read None",))),
        (Kind.NODES, [], Read(None, None, ("nodes: read a list",))),
        (Kind.NODES, {}, Read(None, None, ("metadata.name: read None",))),
        (Kind.NODES, {"metadata": {"name": ""}}, Read(None, None, ("metadata.name: read ",))),
        (Kind.SERVICES, {"metadata": {"name": "w\xe9b"}}, Read(None, None, ("name: read w\\xe9b",))),
        (
            Kind.SERVICES,
            {"metadata": METADATA, "spec": [METADATA]},
            Read(("default", "web"), None, ("spec: read a list",)),
        ),
        (
            Kind.SERVICES,
            {"metadata": METADATA, "spec": {"externalIPs": {}}},
            Read(("default", "web"), None, ("externalIPs: read an object",)),
        ),
        (
            Kind.SERVICES,
            {
                "metadata": METADATA,
                "spec": {"type": "LoadBalancer"},
                "status": {"loadBalancer": {"ingress": ["198.51.100.7"]}},
            },
            Read(("default", "web"), None, ("status.loadBalancer.ingress: read 198.51.100.7",)),
        ),
        (Kind.SERVICES, {"metadata": METADATA}, Read(("default", "web"))),
    ],
)
def test_bad_object(kind: Kind, raw: object, result: Read) -> None:
    """An object of the wrong shape has no value, and the reason is told."""
    assert read(kind, raw) == result


def test_slice() -> None:
    """Everything that is needed of a slice: each endpoint at each port."""
    pod = {"kind": "Pod", "name": "web-1", "namespace": "apps", "uid": "1f"}
    result = endpoint_slice(
        endpoint(nodeName="n1", zone="z1", targetRef=pod, conditions={"ready": True}),
        endpoint("10.1.0.2"),
        ports=[{"name": "http", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    )
    one, two = pack_address("10.1.0.1"), pack_address("10.1.0.2")
    assert result == Read(
        ("default", "web-x"),
        EndpointSlice(
            "default",
            "web-x",
            "web",
            (
                SlicePort("http", Transport.TCP, (Backend(one, 8080, "n1", "z1", "apps", "web-1"), Backend(two, 8080))),
                SlicePort("dns", Transport.UDP, (Backend(one, 53, "n1", "z1", "apps", "web-1"), Backend(two, 53))),
            ),
        ),
    )


@pytest.mark.parametrize(
    ("conditions", "ready", "serving"),
    [
        (None, True, False),
        ({}, True, False),
        ({"ready": None}, True, False),
        ({"ready": True, "serving": True, "terminating": False}, True, False),
        ({"ready": True, "serving": True, "terminating": True}, True, False),  # publishNotReadyAddresses
        ({"ready": False}, False, False),
        ({"ready": False, "serving": True}, False, False),
        ({"ready": False, "serving": True, "terminating": True}, False, True),
        ({"ready": False, "serving": None, "terminating": True}, False, True),
        ({"ready": False, "serving": False, "terminating": True}, False, False),
    ],
)
def test_conditions(conditions: object, ready: object, serving: object) -> None:
    """Absent is good, as kube-proxy has it; serving tells of one that terminates and is all there may be."""
    (backend,) = backends_of(endpoint_slice(endpoint(conditions=conditions)))
    assert (backend.ready, backend.serving) == (ready, serving)


def test_only_the_first_address_counts() -> None:
    """endpointslicecache.go takes Addresses[0]."""
    (backend,) = backends_of(endpoint_slice({"addresses": ["10.1.0.1", "10.1.0.2"]}))
    assert backend == Backend(pack_address("10.1.0.1"), 8080)


def test_ipv6_slice() -> None:
    """The same with IPv6."""
    (backend,) = backends_of(endpoint_slice(endpoint("2001:db8::7"), addressType="IPv6"))
    assert backend == Backend(VIP6, 8080)


@pytest.mark.parametrize(
    ("target", "pod"),
    [
        ({"kind": "Pod", "name": "web-1"}, ("default", "web-1")),
        ({"kind": "Node", "name": "n1"}, (None, None)),
        (None, (None, None)),
    ],
)
def test_target(target: object, pod: tuple[str | None, str | None]) -> None:
    """Only a pod is one, by default in the slice's namespace."""
    (backend,) = backends_of(endpoint_slice(endpoint(targetRef=target)))
    assert (backend.pod_namespace, backend.pod) == pod


@pytest.mark.parametrize(
    "fields",
    [
        {"addressType": "FQDN"},
        {"addressType": None},
        {"metadata": {"name": "web-x", "namespace": "default"}},
        {"metadata": {"name": "web-x", "namespace": "default", "labels": {"kubernetes.io/service-name": ""}}},
    ],
)
def test_not_needed_slice(fields: dict[str, object]) -> None:
    """Names for addresses are for no VIP, and a slice without Service is for none either."""
    assert endpoint_slice(endpoint(), **fields) == Read(("default", "web-x"))


@pytest.mark.parametrize(
    ("port", "name"),
    [({"port": 8080}, ""), ({"name": None, "port": 8080}, ""), ({"name": "http", "port": 8080}, "http")],
)
def test_slice_port_name(port: object, name: str) -> None:
    """No name is the empty name."""
    result = endpoint_slice(endpoint(), ports=[port])
    assert isinstance(result.value, EndpointSlice)
    assert [each.name for each in result.value.ports] == [name]


@pytest.mark.parametrize("port", [{"name": "http", "port": None}, {"name": "http", "port": 0}, {"name": "http"}])
def test_slice_port_without_number(port: object) -> None:
    """kube-proxy passes it over."""
    assert endpoint_slice(endpoint(), ports=[port]) == Read(
        ("default", "web-x"), EndpointSlice("default", "web-x", "web", ())
    )


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"addresses": []}, "endpoints: addresses: read a list"),
        ({"addresses": None}, "endpoints: addresses: read a list"),
        ({"addresses": ["web.example.org"]}, "endpoints: address: read web.example.org"),
        ({"addresses": ["10.1.0.9"], "nodeName": 5}, "endpoints: nodeName: read 5"),
        ("10.1.0.9", "endpoints: endpoint: read 10.1.0.9"),
    ],
)
def test_bad_endpoint(bad: object, problem: str) -> None:
    """It is told, the others are read."""
    result = endpoint_slice(bad, endpoint())
    assert backends_of(result) == (Backend(pack_address("10.1.0.1"), 8080),)
    assert result.problems == (problem,)


@pytest.mark.parametrize("empty", [None, []])
def test_slice_without_endpoints(empty: object) -> None:
    """None at all are none, not an error."""
    assert backends_of(endpoint_slice(endpoints=empty)) == ()


def test_names_are_held_once() -> None:
    """What thousands of endpoints share is one object in memory."""
    one, two = (backends_of(endpoint_slice(endpoint(nodeName=str(b"n1", "ascii"), zone=f"z{n}"))) for n in (1.0, 1.0))
    assert one[0].node is two[0].node
    assert one[0].zone is two[0].zone


@pytest.mark.parametrize(
    ("labels", "zone", "region"),
    [
        (None, None, None),
        ({"topology.kubernetes.io/zone": "z1", "topology.kubernetes.io/region": "r1"}, "z1", "r1"),
        (
            {"failure-domain.beta.kubernetes.io/zone": "z0", "failure-domain.beta.kubernetes.io/region": "r0"},
            "z0",
            "r0",
        ),
        ({"failure-domain.beta.kubernetes.io/zone": "z0", "topology.kubernetes.io/zone": "z1"}, "z1", None),
        ({"failure-domain.beta.kubernetes.io/zone": "z0", "topology.kubernetes.io/zone": ""}, "z0", None),
    ],
)
def test_node_labels(labels: object, zone: str | None, region: str | None) -> None:
    """The labels of today win over those before."""
    assert node(labels) == Read(("", "n1"), Node("n1", zone, region, "0f"))


def test_node_addresses() -> None:
    """Addresses, not names, each once; a bad one is told."""
    addresses = [
        {"type": "InternalIP", "address": "198.51.100.7"},
        {"type": "Hostname", "address": "n1"},
        {"type": "ExternalIP", "address": "2001:db8::7"},
        {"type": "InternalIP", "address": "198.51.100.7"},
        {"type": "InternalIP", "address": "n1"},
        None,
    ]
    assert node(addresses=addresses) == Read(
        ("", "n1"),
        Node("n1", uid="0f", addresses=(VIP, VIP6)),
        ("status.addresses: address: read n1", "status.addresses: entry: read None"),
    )


def test_a_heartbeat_changes_nothing() -> None:
    """Two states of a node that differ in what is not needed are the same value."""
    raw: dict[str, Any] = {"metadata": {"name": "n1"}, "status": {"conditions": [{"lastHeartbeatTime": "1"}]}}
    before = read(Kind.NODES, raw)
    raw["status"]["conditions"][0]["lastHeartbeatTime"] = "2"
    assert read(Kind.NODES, raw) == before == Read(("", "n1"), Node("n1"))


FIELDS = st.sampled_from(
    [
        "metadata",
        "name",
        "namespace",
        "uid",
        "labels",
        "spec",
        "type",
        "status",
        "loadBalancer",
        "ingress",
        "ip",
        "ipMode",
        "hostname",
        "externalIPs",
        "clusterIP",
        "ports",
        "port",
        "protocol",
        "addressType",
        "endpoints",
        "addresses",
        "address",
        "conditions",
        "ready",
        "serving",
        "terminating",
        "targetRef",
        "kind",
        "nodeName",
        "zone",
        "kubernetes.io/service-name",
        "topology.kubernetes.io/zone",
    ]
)
WORDS = st.sampled_from(
    [
        "web",
        "LoadBalancer",
        "IPv4",
        "TCP",
        "UDP",
        "10.0.0.1",
        "2001:db8::1",
        "Pod",
        "InternalIP",
        "None",
        "Local",
        "VIP",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=8),
    max_leaves=40,
)


@given(st.sampled_from(Kind), st.dictionaries(FIELDS, VALUES) | VALUES)
def test_no_object_raises(kind: Kind, raw: object) -> None:
    """Whatever JSON holds, there is an answer, and no value comes without a key."""
    result = read(kind, raw)
    assert result.key is not None or (result.value is None and result.problems)


@given(VALUES, VALUES, VALUES, VALUES)
def test_no_part_raises(one: object, two: object, three: object, four: object) -> None:
    """The same for parts in their right place, deeper than chance would go."""
    for result in (
        service(one, two, externalIPs=three, ports=four),
        endpoint_slice(one, endpoint(conditions=two, targetRef=three, nodeName=four)),
        endpoint_slice(endpoint(zone=two), ports=[one, {"port": three, "name": four}]),
        node(one, two, uid=three),
    ):
        assert result.key is not None
