"""From a kernel record to a told connection."""

from __future__ import annotations

import pytest

from otel_lb_hop.core.hops import Connection, resolve
from otel_lb_hop.core.layout import Record, Verdict
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.model import Backend, Cluster, Failure, Hop, Origin, Outcome
from tests.unit.samples import CLIENT, LOCAL, NODE, POD, REMOTE, SECOND, SNAT, cluster, record, vip_port

OFFSET = 1_700_000_000 * SECOND
INTERFACES = {2: "eth0", 3: "veth1"}


def topology() -> Topology:
    """Make a topology with VIP port 1, hop row 2 (none) and hop row 3 (avoidable, node2, another zone)."""
    made = Topology(NODE)
    made.replace(cluster(vip_port(LOCAL, REMOTE), node1="zone-a"), OFFSET)
    return made


def told(kernel_record: Record) -> Connection:
    """Resolve a record in that topology."""
    connection = resolve(kernel_record, topology(), OFFSET, INTERFACES.get)
    assert connection is not None
    return connection


@pytest.mark.parametrize(
    ("verdict", "outcome", "failure", "answered"),
    [
        (Verdict.ANSWERED, Outcome.FORWARDED, None, True),
        (Verdict.REFUSED, Outcome.FORWARDED, Failure.REFUSED, False),
        (Verdict.TIMEOUT, Outcome.FORWARDED, Failure.TIMEOUT, False),
        (Verdict.REPLY_UNSEEN, Outcome.FORWARDED, None, False),
        (Verdict.DROPPED, Outcome.DROPPED, None, False),
        (Verdict.NO_ENDPOINTS, Outcome.NO_ENDPOINTS, None, False),
        (Verdict.NO_LOCAL_ENDPOINTS, Outcome.NO_LOCAL_ENDPOINTS, None, False),
    ],
)
def test_verdicts(verdict: Verdict, outcome: Outcome, failure: Failure | None, answered: bool) -> None:  # noqa: FBT001
    """Each verdict of the kernel is an outcome, a failure or none, and an answer or none."""
    connection = told(record(verdict))
    assert (connection.outcome, connection.failure, connection.answered) == (outcome, failure, answered)
    assert (connection.handshake_ns is not None) is answered
    assert (connection.hop is Hop.AVOIDABLE) is (outcome is Outcome.FORWARDED)


def test_forwarded() -> None:
    """Everything of a forwarded connection has its name: addresses, endpoint, hop row, interfaces, times."""
    connection = told(record())
    assert connection == Connection(
        trace_high=0x0123456789ABCDEF,
        trace_low=0xFEDCBA9876543210,
        start_ns=OFFSET + 5 * SECOND,
        forwarded_at_ns=OFFSET + 5 * SECOND + 30_000,
        end_ns=OFFSET + 5 * SECOND + 2_000_000,
        vip_id=1,
        vip=connection.vip,
        client=(CLIENT, 40000),
        snat=(SNAT, 24048),
        backend=(POD, 8080),
        endpoint=REMOTE,
        outcome=Outcome.FORWARDED,
        hop=Hop.AVOIDABLE,
        node="node2",
        zone="zone-b",
        zone_crossed=True,
        origin=Origin.EXTERNAL,
        failure=None,
        answered=True,
        interface_in="eth0",
        interface_out="veth1",
        retransmits=0,
    )
    assert (connection.vip.namespace, connection.vip.service, connection.vip.port) == ("default", "web", 80)
    assert (connection.forward_ns, connection.handshake_ns) == (30_000, 2_000_000)


def test_unforwarded() -> None:
    """A connection that was not translated has no SNAT source, no backend and no hop, and nothing is made up."""
    connection = told(record(Verdict.NO_ENDPOINTS, retransmits=2))
    assert (connection.snat, connection.backend, connection.endpoint) == (None, None, None)
    assert (connection.hop, connection.node, connection.zone, connection.zone_crossed) == (
        Hop.UNKNOWN, None, None, None,
    )  # fmt: skip
    assert (connection.forwarded_at_ns, connection.forward_ns, connection.handshake_ns) == (None, None, None)
    assert (connection.interface_in, connection.interface_out, connection.retransmits) == ("eth0", None, 2)
    assert connection.end_ns - connection.start_ns == 2_000_000


def test_answered_without_a_translated_packet() -> None:
    """An answer to a SYN whose translation no hook saw counts as forwarded to a backend that is not known."""
    connection = told(record(forward_ns=0, hop_id=1, out_ifindex=0))
    assert (connection.outcome, connection.hop) == (Outcome.FORWARDED, Hop.UNKNOWN)
    assert (connection.snat, connection.backend, connection.endpoint, connection.forward_ns) == (None, None, None, None)
    assert connection.handshake_ns == 2_000_000


def test_forgotten_vip_port() -> None:
    """A record of a VIP port that is no longer known is None, for the caller to count."""
    assert resolve(record(vip_id=99), topology(), OFFSET, INTERFACES.get) is None


@pytest.mark.parametrize(("forgotten", "endpoint", "zone"), [(False, REMOTE, "zone-b"), (True, None, None)])
def test_retired_vip_port(forgotten: bool, endpoint: Backend | None, zone: str | None) -> None:  # noqa: FBT001
    """A connection whose Service was deleted meanwhile is still told, with the endpoint as long as that lingers."""
    made = topology()
    made.replace(Cluster(), OFFSET + SECOND)
    if forgotten:
        made.forget_endpoints(OFFSET + SECOND)
    connection = resolve(record(), made, OFFSET, INTERFACES.get)
    assert connection is not None
    assert (connection.vip.service, connection.hop, connection.node) == ("web", Hop.AVOIDABLE, "node2")
    assert (connection.endpoint, connection.zone) == (endpoint, zone)


def test_hop_is_that_of_the_moment_of_forwarding() -> None:
    """The hop class is the row's that the kernel counted in, not what the topology says by now."""
    made = topology()
    made.replace(cluster(vip_port(REMOTE)), OFFSET + SECOND)
    connection = resolve(record(hop_id=3), made, OFFSET, INTERFACES.get)
    assert connection is not None
    assert connection.hop is Hop.AVOIDABLE


@pytest.mark.parametrize("hop_id", [1, 99])
def test_unknown_hop_row(hop_id: int) -> None:
    """The VIP port's own row, and one that was forgotten, are a hop that is not known; the addresses stay."""
    connection = told(record(hop_id=hop_id, backend=LOCAL.address[:15] + b"\x63"))
    assert (connection.hop, connection.node, connection.zone_crossed) == (Hop.UNKNOWN, None, None)
    assert connection.backend == (LOCAL.address[:15] + b"\x63", 8080)
    assert connection.endpoint is None


def test_unknown_interfaces() -> None:
    """Interfaces that are gone have no name."""
    connection = told(record(in_ifindex=77, out_ifindex=78))
    assert (connection.interface_in, connection.interface_out) == (None, None)


def test_internal_origin() -> None:
    """A connection that began inside is told as such."""
    assert told(record(origin=0)).origin is Origin.INTERNAL


@pytest.mark.parametrize("offset", [0, OFFSET, -3 * SECOND])
def test_times(offset: int) -> None:
    """Wall times are the kernel's times and the offset; durations do not depend on it."""
    connection = resolve(record(), topology(), offset, INTERFACES.get)
    assert connection is not None
    assert connection.forwarded_at_ns is not None
    assert connection.start_ns == 5 * SECOND + offset
    assert connection.forwarded_at_ns - connection.start_ns == connection.forward_ns == 30_000
    assert connection.end_ns - connection.start_ns == connection.handshake_ns == 2_000_000
