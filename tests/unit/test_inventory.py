"""Services and EndpointSlices, in any order, and the VIP ports that come of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_lb_hop.core.inventory import Inventory, Key
from otel_lb_hop.model import (
    Backend,
    EndpointSlice,
    Policy,
    Service,
    ServicePort,
    Skipped,
    SlicePort,
    Transport,
    VipPort,
    format_address,
    pack_address,
)
from tests.unit.samples import BACKENDS, backend

if TYPE_CHECKING:
    from random import Random

TCP, UDP = Transport.TCP, Transport.UDP
WEB = ("default", "web")
HTTP = ServicePort("", 80, TCP)
LOCAL, REMOTE = backend("10.100.1.2"), backend("10.100.2.2", "node2")
REMOTE6 = backend("fd00:100::2", "node2")
EVERYTHING = 1_000


def service(*ports: ServicePort, vips: tuple[str, ...] = ("10.0.10.0",), **more: Any) -> Service:  # noqa: ANN401
    """Make default/web with policy Cluster."""
    policy = more.pop("policy", Policy.CLUSTER)
    external = tuple(map(pack_address, more.pop("external_ips", ())))
    return Service(*WEB, policy, tuple(map(pack_address, vips)), ports or (HTTP,), external, **more)


def port_of(*backends: Backend, name: str = "", transport: Transport = TCP) -> SlicePort:
    """Make a port of a slice."""
    return SlicePort(name, transport, backends)


def endpoints(*ports: SlicePort, name: str = "web-1", of: str = "web") -> EndpointSlice:
    """Make a slice of a Service in the namespace default."""
    return EndpointSlice("default", name, of, ports)


def inventory(*objects: Service | EndpointSlice, **more: Any) -> Inventory:  # noqa: ANN401
    """Make an inventory that has read these objects, and all there are."""
    made = Inventory(more.get("policies", tuple(Policy)), external_ips=more.get("external_ips", True))
    for each in objects:
        put(made, each)
    made.learn_endpoints()
    return made


def put(made: Inventory, each: Service | EndpointSlice) -> None:
    """Give an object to an inventory."""
    if isinstance(each, Service):
        made.put_service((each.namespace, each.name), each)
    else:
        made.put_slice((each.namespace, each.name), each)


def taken(made: Inventory) -> dict[Key, list[tuple[str, int, str, list[str]]]]:
    """Take all changes: for each VIP port its address, port, transport, and its endpoints as people write them."""
    return {
        key: [
            (
                format_address(each.address),
                each.port,
                each.transport.name,
                [f"{format_address(one.address)} {one.port}" for one in each.backends],
            )
            for each in vip_ports
        ]
        for key, vip_ports in made.take_changed(EVERYTHING).items()
    }


def test_a_vip_port_has_all_that_is_known() -> None:
    """A Service with one port and one slice is one VIP port with the slice's endpoints, in the Service's name."""
    made = inventory(service(policy=Policy.LOCAL), endpoints(port_of(LOCAL, REMOTE)))
    assert made.take_changed(EVERYTHING) == {
        WEB: (VipPort(pack_address("10.0.10.0"), 80, TCP, "default", "web", Policy.LOCAL, (LOCAL, REMOTE)),)
    }
    assert (made.waiting, made.skipped, made.take_changed(EVERYTHING)) == (False, [], {})


def test_ports_are_joined_by_name_and_protocol() -> None:
    """The target port may be another for each endpoint, as with a named one; what no port names is nobody's."""
    ports = ServicePort("http", 80, TCP), ServicePort("dns", 53, TCP), ServicePort("dns", 53, UDP)
    made = inventory(
        service(*ports),
        endpoints(port_of(LOCAL, name="http"), port_of(backend("10.100.1.2", port=5353), name="dns", transport=UDP)),
        endpoints(port_of(backend("10.100.2.2", "node2", port=8081), name="http"), name="web-2"),
        endpoints(port_of(backend("10.100.3.2", port=9090), name="metrics"), port_of(REMOTE), name="web-3"),
    )
    assert taken(made) == {
        WEB: [
            ("10.0.10.0", 80, "TCP", ["10.100.1.2 8080", "10.100.2.2 8081"]),
            ("10.0.10.0", 53, "TCP", []),
            ("10.0.10.0", 53, "UDP", ["10.100.1.2 5353"]),
        ]
    }


def test_a_service_without_a_selector_has_the_slices_that_name_it() -> None:
    """Endpoints that someone wrote by hand, without node or pod, are endpoints."""
    made = inventory(service(), endpoints(port_of(backend("192.0.2.80", None)), name="by-hand"))
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", ["192.0.2.80 8080"])]}


def test_dual_stack() -> None:
    """A VIP has the endpoints of its family, from the slices of both."""
    made = inventory(
        service(vips=("10.0.10.0", "fd00:10::1")),
        endpoints(port_of(REMOTE), name="web-4"),
        endpoints(port_of(REMOTE6), name="web-6"),
    )
    assert taken(made) == {
        WEB: [("10.0.10.0", 80, "TCP", ["10.100.2.2 8080"]), ("fd00:10::1", 80, "TCP", ["fd00:100::2 8080"])]
    }


UNREADY = dataclasses.replace(LOCAL, ready=False)
SERVING = dataclasses.replace(UNREADY, serving=True, pod="ending")


@pytest.mark.parametrize("names", [("web-1", "web-2"), ("web-2", "web-1")])
@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [(LOCAL, UNREADY, LOCAL), (LOCAL, SERVING, LOCAL), (SERVING, UNREADY, SERVING)],
)
def test_an_endpoint_in_two_slices_counts_once(
    names: tuple[str, str], first: Backend, second: Backend, winner: Backend
) -> None:
    """While an endpoint moves between slices, or its address goes over to another pod, the one that takes counts."""
    slices = [endpoints(port_of(one), name=name) for one, name in zip((first, second), names, strict=True)]
    for order in (slices, slices[::-1]):
        ((vip_port,),) = inventory(service(), *order).take_changed(EVERYTHING).values()
        assert vip_port.backends == (winner,)


def test_an_endpoint_that_two_slices_tell_alike_is_that_of_the_first_by_name() -> None:
    """Where nothing else decides, the order in which slices came does not."""
    slices = [
        endpoints(port_of(REMOTE), name="web-1"),
        endpoints(port_of(dataclasses.replace(REMOTE, node="node3")), name="web-2"),
    ]
    for order in (slices, slices[::-1]):
        ((vip_port,),) = inventory(service(), *order).take_changed(EVERYTHING).values()
        assert vip_port.backends == (REMOTE,)


def test_slice_moves_to_another_service() -> None:
    """A slice whose label changes leaves one Service and comes to the other; both have changed."""
    other = dataclasses.replace(service(vips=("10.0.10.1",)), name="other")
    made = inventory(service(), other, endpoints(port_of(LOCAL)))
    assert taken(made) == {
        WEB: [("10.0.10.0", 80, "TCP", ["10.100.1.2 8080"])],
        ("default", "other"): [("10.0.10.1", 80, "TCP", [])],
    }
    put(made, endpoints(port_of(LOCAL), of="other"))
    assert taken(made) == {
        WEB: [("10.0.10.0", 80, "TCP", [])],
        ("default", "other"): [("10.0.10.1", 80, "TCP", ["10.100.1.2 8080"])],
    }


def test_same_names_in_another_namespace_are_others() -> None:
    """A slice belongs to the Service of its own namespace."""
    made = inventory(service(), EndpointSlice("shop", "web-1", "web", (port_of(LOCAL),)), endpoints(port_of(REMOTE)))
    made.put_slice(("shop", "web-1"), None)
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", ["10.100.2.2 8080"])]}


def test_slice_before_its_service() -> None:
    """Endpoints of a Service that is not known change nothing, and are there when it comes, also for the second time.

    Most Services of a cluster have no VIP: that their endpoints change must not cost anything.
    """
    made = inventory(endpoints(port_of(LOCAL)))
    assert (made.waiting, taken(made)) == (False, {})
    for _ in range(2):
        put(made, service())
        assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", ["10.100.1.2 8080"])]}
        made.put_service(WEB, None)
        assert taken(made) == {WEB: []}


def test_service_before_its_slice() -> None:
    """A Service is told without endpoints first, and again with each slice that comes, changes or goes."""
    made = inventory(service())
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", [])]}
    put(made, endpoints(port_of(LOCAL)))
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", ["10.100.1.2 8080"])]}
    put(made, endpoints(port_of(REMOTE)))
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", ["10.100.2.2 8080"])]}
    made.put_slice(("default", "web-1"), None)
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", [])]}


def test_what_was_never_known_is_deleted_without_a_change() -> None:
    """A Service that can be no VIP's, or a slice, that goes without having come is no news."""
    made = inventory()
    made.put_service(WEB, None)
    made.put_slice(("default", "web-1"), None)
    assert (made.waiting, made.take_changed(EVERYTHING)) == (False, {})


def test_service_without_a_vip_has_no_vip_port() -> None:
    """As long as the load balancer gave no address there is nothing to watch; when it takes it away, no more."""
    made = inventory(service(vips=()), endpoints(port_of(LOCAL)))
    assert taken(made) == {WEB: []}
    put(made, service())
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", ["10.100.1.2 8080"])]}
    put(made, service(vips=()))
    assert (taken(made), made.skipped) == ({WEB: []}, [])


def test_policies_that_are_left_out_are_told_as_skipped() -> None:
    """OTEL_LB_HOP_POLICY leaves Services out by VIP; one that changes its policy comes back."""
    made = inventory(service(vips=("10.0.10.0", "fd00:10::1")), policies=[Policy.LOCAL])
    assert taken(made) == {WEB: []}
    reason = "OTEL_LB_HOP_POLICY leaves Cluster out"
    assert made.skipped == [Skipped(*WEB, "10.0.10.0", reason), Skipped(*WEB, "fd00:10::1", reason)]
    put(made, service(policy=Policy.LOCAL))
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", [])]}
    assert made.skipped == []


def test_what_is_no_vip_is_told_as_skipped() -> None:
    """What the parser could make no VIP of is told beside what is watched, by Service, until it goes."""
    hostname = ("lb.example.com", "a hostname is no address")
    other = dataclasses.replace(service(skipped=(hostname,), vips=()), name="other")
    made = inventory(service(skipped=(hostname,)), other)
    assert taken(made) == {WEB: [("10.0.10.0", 80, "TCP", [])], ("default", "other"): []}
    assert made.skipped == [Skipped("default", "other", *hostname), Skipped(*WEB, *hostname)]
    made.put_service(WEB, None)
    put(made, dataclasses.replace(other, skipped=()))
    assert taken(made) == {WEB: [], ("default", "other"): []}
    assert made.skipped == []


@pytest.mark.parametrize(
    ("wanted", "vips", "skipped"),
    [
        (True, ["10.0.10.0", "192.0.2.9"], []),
        (False, ["10.0.10.0"], [Skipped(*WEB, "192.0.2.9", "OTEL_LB_HOP_EXTERNAL_IPS is false")]),
    ],
)
def test_external_ips(wanted: bool, vips: list[str], skipped: list[Skipped]) -> None:  # noqa: FBT001
    """External IPs are VIPs if they are wanted, else told as skipped; one that is a VIP anyway, or twice, is one."""
    external = ("10.0.10.0", "192.0.2.9", "192.0.2.9")
    made = inventory(service(external_ips=external), external_ips=wanted)
    assert [vip for vip, *_ in taken(made)[WEB]] == vips
    assert made.skipped == skipped


def test_external_ips_alone() -> None:
    """A Service that no load balancer serves can have external IPs."""
    made = inventory(service(vips=(), external_ips=("192.0.2.9",)), endpoints(port_of(LOCAL)))
    assert taken(made) == {WEB: [("192.0.2.9", 80, "TCP", ["10.100.1.2 8080"])]}


def test_changes_are_taken_a_few_at_a_time() -> None:
    """Each changed Service is told once, the longest waiting first, with what it is by then."""
    names = ["c", "a", "b"]
    made = inventory(*(dataclasses.replace(service(), name=name) for name in names))
    assert list(made.take_changed(2)) == [("default", "c"), ("default", "a")]
    assert made.waiting
    put(made, endpoints(port_of(LOCAL), of="b"))
    put(made, endpoints(port_of(LOCAL), name="a-1", of="a"))
    assert made.take_changed(0) == {}
    ((key, (vip_port,)),) = made.take_changed(1).items()
    assert (key, vip_port.backends) == (("default", "b"), (LOCAL,))
    assert list(made.take_changed(EVERYTHING)) == [("default", "a")]
    assert not made.waiting


def test_endpoints_are_unknown_until_all_slices_were_read() -> None:
    """Until then no VIP port says that it has no endpoints; then every Service is told anew, once."""
    made = Inventory(tuple(Policy), external_ips=True)
    other = dataclasses.replace(service(vips=("10.0.10.1",)), name="other")
    for each in (service(), other, endpoints(port_of(LOCAL))):
        put(made, each)
    before = made.take_changed(EVERYTHING)
    assert [(each.endpoints_known, each.backends) for (each,) in before.values()] == [(False, (LOCAL,)), (False, ())]
    made.learn_endpoints()
    after = made.take_changed(EVERYTHING)
    assert [(each.endpoints_known, each.backends) for (each,) in after.values()] == [(True, (LOCAL,)), (True, ())]
    made.learn_endpoints()
    assert not made.waiting


_NAMES = st.sampled_from(["a", "b"])
_PORTS = st.builds(
    ServicePort, st.sampled_from(["", "", "x"]), st.sampled_from([80, 81]), st.sampled_from([TCP, TCP, UDP])
)
_SERVICES = st.builds(
    lambda name, ports, **more: dataclasses.replace(service(*ports, **more), name=name),
    _NAMES,
    st.lists(_PORTS, min_size=1, max_size=2),
    vips=st.sampled_from([("10.0.10.0",), ("10.0.10.1", "fd00:10::1"), ()]),
    external_ips=st.sampled_from([(), ("10.0.10.0",)]),
    policy=st.sampled_from(Policy),
    skipped=st.sampled_from([(), (("a", "b"),)]),
)
_SLICE_PORTS = st.builds(
    lambda backends, **fields: port_of(*backends, **fields),
    st.lists(BACKENDS, max_size=3),
    name=st.sampled_from(["", "", "x"]),
    transport=st.sampled_from([TCP, TCP, UDP]),
)
_SLICES = st.builds(
    lambda ports, **fields: endpoints(*ports, **fields),
    st.lists(_SLICE_PORTS, max_size=2),
    name=st.sampled_from(["s", "t", "u"]),
    of=_NAMES,
)
_GONE = st.tuples(st.sampled_from(["service", "slice"]), st.sampled_from(["a", "b", "s", "t", "u"]))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(_SERVICES, _SLICES, _GONE), max_size=12), st.randoms(use_true_random=False))
def test_any_history_of_the_same_end(steps: list[Service | EndpointSlice | tuple[str, str]], random: Random) -> None:
    """However objects came, changed, moved and went, and were taken meanwhile: the end is that of the last of each."""
    made = Inventory([Policy.CLUSTER], external_ips=True)
    services: dict[str, Service] = {}
    slices: dict[str, EndpointSlice] = {}
    told: dict[Key, tuple[VipPort, ...]] = {}
    for step in steps:
        if isinstance(step, tuple):
            kind, name = step
            (services if kind == "service" else slices).pop(name, None)
            (made.put_service if kind == "service" else made.put_slice)(("default", name), None)
        else:
            put(made, step)
            if isinstance(step, Service):
                services[step.name] = step
            else:
                slices[step.name] = step
        told |= made.take_changed(random.randrange(3))
        if random.randrange(8) == 0:
            made.learn_endpoints()
    made.learn_endpoints()
    told |= made.take_changed(EVERYTHING)
    last: list[Service | EndpointSlice] = [*services.values(), *slices.values()]
    random.shuffle(last)
    fresh = inventory(*last, policies=[Policy.CLUSTER])
    wanted = fresh.take_changed(EVERYTHING)
    assert wanted.keys() == {("default", name) for name in services}
    assert {key: each for key, each in told.items() if each} == {key: each for key, each in wanted.items() if each}
    assert made.skipped == fresh.skipped
    assert all(made._slices.values())
