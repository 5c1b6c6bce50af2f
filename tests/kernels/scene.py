"""An agent at work on the first node of a lab, where its reports arrive, and what they have to say."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from otel_lb_hop.model import Transport, format_address
from tests.demo.sink import PORT, Sink, listen
from tests.e2e import truth
from tests.lab.agent import agents_on
from tests.lab.waiting import TookTooLongError, wait_for

if TYPE_CHECKING:
    from otel_lb_hop.model import VipPort
    from tests.demo.otlp import Point, Record
    from tests.lab import Lab, Node

SENT = 23
TARGET_PORT, SCTP_PORT = 8080, 8081
ANSWER_SECONDS = 20.0
TIMES = {"lb_hop.forward.duration", "lb_hop.handshake.duration"}


def services_of(lab: Lab) -> dict[str, VipPort]:
    """Describe a Service for each test, on a VIP of its own, so that none sees another's connections."""
    far = ("ipip-pods", "wireguard-pods")
    names = ("vlan", "qinq", "ipip", "wireguard", *far, "delay")
    services = {
        name: lab.vip_port(
            f"10.0.70.{number}",
            80,
            service=name,
            backends=lab.pods[1:] if name in far else lab.pods,
            target_port=TARGET_PORT,
        )
        for number, name in enumerate(names, start=1)
    }
    for number, (name, pods) in enumerate({"sctp": lab.pods, "sctp-none": []}.items(), start=len(names) + 1):
        services[name] = lab.vip_port(
            f"10.0.70.{number}",
            80,
            service=name,
            transport=Transport.SCTP,
            backends=pods,
            target_port=SCTP_PORT,
        )
    return services


class Scene:
    """One agent on node1. Use it as a context, with the Services applied before."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.node: Node = lab.nodes[0]
        self.services = services_of(lab)
        self.sink = Sink()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        lab = self.lab
        for pod in lab.pods:
            pod.serve(TARGET_PORT)
        server = lab.mgmt.in_netns(lambda: listen(self.sink, lab.mgmt.address4))
        with contextlib.ExitStack() as stack:
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            settings = {
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{lab.mgmt.address4}:{PORT}",
                "OTEL_TRACES_EXPORTER": "none",
            }
            (self.agent,) = stack.enter_context(agents_on([self.node], lab.vips_path, settings))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def hooked(self, *names: str, uplink: bool = False) -> None:
        """Wait until the agent watches these interfaces too, and knows them as uplinks if they are."""
        listed = "uplinks" if uplink else "hooked"
        wait_for(f"{listed}: {names}", lambda: {*names} <= {*self.agent.part("interfaces")["detail"][listed]})

    def route(self, name: str, gateway: str) -> None:
        """Let the router send the VIP of a Service by this way."""
        self.lab.router.run(["ip", "route", "replace", self.vip(name), "via", gateway])

    def vip(self, name: str) -> str:
        """Return the address of a Service."""
        return format_address(self.services[name].address)

    def deliver(self, name: str, interface: str, *, concurrency: int = 8) -> list[Record]:
        """Send 23 connections to a Service; each is told as it went, once. Answers the records of these."""
        service = self.services[name]
        before = len(self.records(name))
        truth.forget_connections(self.lab)
        counts = truth.accepted_counts(self.lab)
        results = self.lab.connect(self.vip(name), 80, SENT, concurrency=concurrency, timeout=ANSWER_SECONDS)
        assert [result.error for result in results] == [""] * SENT
        told = truth.follow(self.lab, service, results, truth.accepted_since(self.lab, counts))
        wait_for("the records", lambda: len(self.records(name)) >= before + SENT)
        records = self.records(name)[before:]
        expected = [truth.record_attributes(service, each, interface) for each in told]
        seen, sent = _as_bag(_without_times(record.attributes) for record in records), _as_bag(expected)
        assert seen == sent, f"told {list(seen - sent)[:1]}, not {list(sent - seen)[:1]}"
        self.wait_for_counts(name, before + SENT)
        return records

    def records(self, name: str) -> list[Record]:
        """Return the records of a Service."""
        return [each for each in self.sink.records() if each.attributes["k8s.service.name"] == name]

    def points(self, metric: str, name: str) -> list[Point]:
        """Return the points of a Service that are not zero, as they are now."""
        return [
            each
            for each in self.sink.points()
            if each.metric == metric
            and each.attributes.get("k8s.service.name") == name
            and (each.value or any(each.buckets))
        ]

    def wait_for_counts(self, name: str, count: int, outcome: str = "forwarded") -> None:
        """Wait until so many external connections of a Service are counted, and no other; none is lost."""

        def counted() -> dict[tuple[Any, Any], float]:
            found: Counter[tuple[Any, Any]] = Counter()
            for each in self.points("lb_hop.connections", name):
                found[each.attributes["lb_hop.outcome"], each.attributes["lb_hop.origin"]] += int(each.value)
            return dict(found)

        with contextlib.suppress(TookTooLongError):
            wait_for(f"{count} connections", lambda: counted() == {(outcome, "external"): count})
        assert counted() == {(outcome, "external"): count}
        for metric in ("lb_hop.handshake.failures", "lb_hop.replies.unseen", "lb_hop.syn.retransmits"):
            assert self.points(metric, name) == []


def _without_times(attributes: Any) -> dict[str, Any]:  # noqa: ANN401 - a mapping of any values
    return {key: value for key, value in attributes.items() if key not in TIMES}


def _as_bag(records: Any) -> Counter[frozenset[Any]]:  # noqa: ANN401 - an iterable of mappings
    return Counter(frozenset(record.items()) for record in records)
