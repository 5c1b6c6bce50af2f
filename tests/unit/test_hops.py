"""From a kernel record to a told connection."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.hops import Connection, Course, Courses, resolve, tell
from otel_lb_hop.core.layout import Record, Verdict
from otel_lb_hop.core.topology import Source, Topology
from otel_lb_hop.model import Backend, Cluster, Failure, Hop, Node, Origin, Outcome
from tests.unit.samples import CLIENT, LOCAL, NODE, POD, REMOTE, SECOND, SNAT, cluster, record, vip_port

if TYPE_CHECKING:
    from collections.abc import Callable

OFFSET = 1_700_000_000 * SECOND
INTERFACES = {2: "eth0", 3: "veth1"}


def topology() -> Topology:
    """Make a topology with VIP port 1, hop row 2 (none) and hop row 3 (avoidable, node2, another zone)."""
    made = Topology(NODE)
    made.replace(cluster(vip_port(LOCAL, REMOTE), node1="zone-a"), OFFSET)
    return made


def told(kernel_record: Record) -> Connection:
    """Resolve a record in that topology."""
    return told_in(topology(), kernel_record)


def told_in(known: Topology, kernel_record: Record, offset: int = OFFSET) -> Connection:
    """Resolve a record."""
    course = resolve(kernel_record.kind, known, INTERFACES.get)
    assert course is not None
    return tell(kernel_record, course, offset)


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
    course = connection.course
    assert (course.outcome, course.failure, course.answered) == (outcome, failure, answered)
    assert course.bad is (failure is not None or outcome is not Outcome.FORWARDED)
    assert (connection.handshake_ns is not None) is answered
    assert (course.hop is Hop.AVOIDABLE) is (outcome is Outcome.FORWARDED)


def test_forwarded() -> None:
    """Everything of a forwarded connection has its name: addresses, endpoint, hop row, interfaces, times."""
    connection = told(record())
    course = connection.course
    assert connection == Connection(
        course=course,
        trace_id=bytes.fromhex("0123456789abcdeffedcba9876543210"),
        start_ns=OFFSET + 5 * SECOND,
        forwarded_at_ns=OFFSET + 5 * SECOND + 30_000,
        end_ns=OFFSET + 5 * SECOND + 2_000_000,
        client=(CLIENT, 40000),
        snat=(SNAT, 24048),
        retransmits=0,
    )
    assert asdict(course) == asdict(
        Course(
            vip_id=1,
            vip=course.vip,
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
            timed=True,
            interface_in="eth0",
        )
    )
    assert (course.vip.namespace, course.vip.service, course.vip.port) == ("default", "web", 80)
    assert (connection.forward_ns, connection.handshake_ns) == (30_000, 2_000_000)


def test_unforwarded() -> None:
    """A connection that was not translated has no SNAT source, no backend and no hop, and nothing is made up."""
    connection = told(record(Verdict.NO_ENDPOINTS, retransmits=2))
    assert (connection.snat, connection.course.backend, connection.course.endpoint) == (None, None, None)
    assert (connection.course.hop, connection.course.node, connection.course.zone, connection.course.zone_crossed) == (
        Hop.UNKNOWN, None, None, None,
    )  # fmt: skip
    assert (connection.forwarded_at_ns, connection.forward_ns, connection.handshake_ns) == (None, None, None)
    assert (connection.course.interface_in, connection.retransmits) == ("eth0", 2)
    assert connection.end_ns - connection.start_ns == 2_000_000


def test_answered_without_a_translated_packet() -> None:
    """An answer to a SYN whose translation no hook saw counts as forwarded to a backend that is not known."""
    connection = told(record(forward_ns=0, hop_id=1, translated=0))
    assert (connection.course.outcome, connection.course.hop) == (Outcome.FORWARDED, Hop.UNKNOWN)
    assert (connection.snat, connection.course.backend, connection.course.endpoint, connection.forward_ns) == (
        None,
        None,
        None,
        None,
    )
    assert connection.handshake_ns == 2_000_000


def test_forgotten_vip_port() -> None:
    """A record of a VIP port that is no longer known is None, for the caller to count."""
    assert resolve(record(vip_id=99).kind, topology(), INTERFACES.get) is None


@pytest.mark.parametrize(("forgotten", "endpoint", "zone"), [(False, REMOTE, "zone-b"), (True, None, None)])
def test_retired_vip_port(forgotten: bool, endpoint: Backend | None, zone: str | None) -> None:  # noqa: FBT001
    """A connection whose Service was deleted meanwhile is still told, with the endpoint as long as that lingers."""
    made = topology()
    made.replace(Cluster(), OFFSET + SECOND)
    if forgotten:
        made.forget_endpoints(OFFSET + SECOND)
    connection = told_in(made, record())
    assert (connection.course.vip.service, connection.course.hop, connection.course.node) == (
        "web",
        Hop.AVOIDABLE,
        "node2",
    )
    assert (connection.course.endpoint, connection.course.zone) == (endpoint, zone)


def test_hop_is_that_of_the_moment_of_forwarding() -> None:
    """The hop class is the row's that the kernel counted in, not what the topology says by now."""
    made = topology()
    made.replace(cluster(vip_port(REMOTE)), OFFSET + SECOND)
    connection = told_in(made, record(hop_id=3))
    assert connection.course.hop is Hop.AVOIDABLE


@pytest.mark.parametrize("hop_id", [1, 99])
def test_unknown_hop_row(hop_id: int) -> None:
    """The VIP port's own row, and one that was forgotten, are a hop that is not known; the addresses stay."""
    connection = told(record(hop_id=hop_id, backend=LOCAL.address[:15] + b"\x63"))
    assert (connection.course.hop, connection.course.node, connection.course.zone_crossed) == (Hop.UNKNOWN, None, None)
    assert connection.course.backend == (LOCAL.address[:15] + b"\x63", 8080)
    assert connection.course.endpoint is None


def test_unknown_interfaces() -> None:
    """Interfaces that are gone have no name."""
    connection = told(record(in_ifindex=77))
    assert connection.course.interface_in is None


def test_internal_origin() -> None:
    """A connection that began inside is told as such."""
    assert told(record(origin=0)).course.origin is Origin.INTERNAL


@pytest.mark.parametrize("offset", [0, OFFSET, -3 * SECOND])
def test_times(offset: int) -> None:
    """Wall times are the kernel's times and the offset; durations do not depend on it."""
    connection = told_in(topology(), record(), offset)
    assert connection.forwarded_at_ns is not None
    assert connection.start_ns == 5 * SECOND + offset
    assert connection.forwarded_at_ns - connection.start_ns == connection.forward_ns == 30_000
    assert connection.end_ns - connection.start_ns == connection.handshake_ns == 2_000_000


def test_courses_are_resolved_once_until_their_vip_port_changes() -> None:
    """Records of one kind share a course; after a change of its VIP port, and only then, it is made anew."""
    made = topology()
    courses = Courses(made)
    made.take_touched()
    first, second, other = courses.of([record(), record(syn_ns=1), record(Verdict.REFUSED)])
    assert first is second
    assert first is not None
    assert other is not None
    assert (first.failure, other.failure) == (None, Failure.REFUSED)
    made.replace(cluster(vip_port(LOCAL, replace(REMOTE, pod="web-9")), node1="zone-a"), OFFSET + SECOND)
    assert courses.of([record()]) == [first]
    assert made.take_touched() == {1}
    assert made.take_touched() == set()
    courses.forget({2})
    assert courses.of([record()]) == [first]
    courses.forget({1})
    (again,) = courses.of([record()])
    assert again is not None
    assert again.endpoint is not None
    assert (again.endpoint.pod, again is first) == ("web-9", False)


def test_names_of_interfaces() -> None:
    """Names stay known after an interface has gone; only when a number gets another name are courses made anew."""
    courses = Courses(topology())
    assert [course.interface_in for course in courses.of([record()]) if course] == [None]
    courses.name_interfaces({2: "eth0"})
    (unnamed,) = courses.of([record()])
    assert unnamed is not None
    assert unnamed.interface_in is None
    courses.name_interfaces({2: "eth0", 3: "veth1"})
    assert courses.of([record()]) == [unnamed]
    courses.name_interfaces({2: "lan0"})
    (named,) = courses.of([record()])
    assert named is not None
    assert named.interface_in == "lan0"
    courses.name_interfaces({3: "veth1"})
    assert courses.of([record(), record(in_ifindex=2, origin=0)])[0] is named
    assert [course.interface_in for course in courses.of([record(origin=0)]) if course] == ["lan0"]


def test_courses_that_nobody_knows() -> None:
    """A record without a VIP port is None in its place, and is looked for again when it comes again."""
    made = Topology(NODE)
    courses = Courses(made)
    assert courses.of([record(), record()]) == [None, None]
    made.replace(cluster(vip_port(LOCAL, REMOTE), node1="zone-a"), OFFSET)
    found = courses.of([record(vip_id=99), record()])
    assert [course is None for course in found] == [True, False]


def test_courses_are_bounded() -> None:
    """Beyond the limit the oldest is forgotten; nothing else happens to it than to be resolved anew."""
    courses = Courses(topology(), limit=2)
    kinds = [record(in_ifindex=number) for number in range(3)]
    first = courses.of(kinds)
    assert None not in first
    assert courses.of(kinds[1:]) == first[1:]
    assert courses.of(kinds[:1]) != first[:1]


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.replace(Cluster(), OFFSET + SECOND),
        lambda made: made.update_nodes(Source.FILE, {"node2": Node("node2", "zone-c")}, OFFSET),
        lambda made: made.update_nodes(Source.FILE, {NODE: Node(NODE, "zone-c")}, OFFSET),
    ],
    ids=["gone", "zone of a backend", "zone of this node"],
)
def test_what_changes_a_course_touches_its_vip_port(change: Callable[[Topology], None]) -> None:
    """Whatever a course says of a VIP port, a change of it is told."""
    made = topology()
    assert made.take_touched() == {1}
    change(made)
    assert made.take_touched() == {1}


def test_an_endpoint_that_is_forgotten_touches_its_vip_port() -> None:
    """Once it no longer lingers, records of it name no pod."""
    made = topology()
    made.replace(cluster(vip_port(LOCAL), node1="zone-a"), OFFSET)
    made.take_touched()
    made.forget_endpoints(OFFSET)
    assert made.take_touched() == {1}
