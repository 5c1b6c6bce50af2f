"""What comes and goes: Services, interfaces, connections, the sink, an agent; by a plan of chance that a seed makes.

Every connection to a churning Service is made between two moments: when the programs of all nodes look for it, and
when it is taken away. So each is to be counted, once.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from otel_lb_hop.agent import TICK_SECONDS
from otel_lb_hop.model import Backend, Policy, Transport, format_address, pack_address

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otel_lb_hop.model import VipPort
    from tests.lab import Connection, Lab, Node
    from tests.soak.seats import Seat
    from tests.soak.sink import Sink

SERVED, UNSERVED, UDP_SERVED = 8080, 8081, 8053
DNS_PORT, SECOND_DNS_PORT = 53, 54
MOST_SERVICES, MOST_INTERFACES = 12, 8
SHORT_SECONDS, LONG_SECONDS = 0.3, 1.5
"""How long a client waits: less than until its second SYN, or until after it."""
GHOST = "10.100.1.250"
"""Where no pod is."""
NEVER_SENT = {"EADDRNOTAVAIL", "ENETUNREACH", "EINVAL", "EMFILE", "EADDRINUSE"}
"""With these errors no packet may have left the client: nobody could say what is to be counted."""

Service: TypeAlias = "list[VipPort]"
T = TypeVar("T")


class Churn:
    """The plan, what is there now, and what was done. One thread does it all; the killed agent's seat is the last."""

    def __init__(self, lab: Lab, seats: Sequence[Seat], sink: Sink, steady: Sequence[VipPort], seed: str) -> None:
        self._lab = lab
        self._seats = seats
        self._receiver = sink
        self._steady = list(steady)
        self._chance = random.Random(seed)
        self._services: dict[str, Service] = {}
        self._dns: Service = []
        self._dns_asked: set[int] = set()
        self._interfaces: dict[str, Node] = {}
        self._number = 0
        self.events: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self.vip_ports_made = 0

    def run(self, seconds: float, between: Callable[[], None]) -> None:
        """Go on for so long, and at least until everything has been done once; call `between` after each thing."""
        began = time.monotonic()
        whole = False
        while True:
            deck = [self.services] * 3 + [self.interfaces] * 4 + [self.connections] * 2 + [self.sink, self.kill]
            self._chance.shuffle(deck)
            for action in deck:
                if whole and time.monotonic() - began > seconds:
                    return
                action()
                between()
                time.sleep(self._chance.uniform(0.0, 0.4))
            whole = True

    def end(self) -> None:
        """Take away all that churned."""
        for name in list(self._interfaces):
            self._delete_interface(name)
        had_dns = bool(self._dns)
        self._services, self._dns = {}, []
        self.apply()
        if had_dns:
            for seat in self._seats:
                seat.wait_for_conntrack("not needed")

    def apply(self) -> None:
        """Make the Services of the lab those that are there now."""
        self._lab.apply([*self._steady, *(each for ports in self._services.values() for each in ports), *self._dns])

    # Services

    def services(self) -> None:
        """Let some Services go, some change, some come, all at once; then call the new ones."""
        names = list(self._services)
        too_many = max(0, len(names) - MOST_SERVICES)
        for name in self._chance.sample(names, too_many) or self._some(names, 2):
            del self._services[name]
            self.events["Services gone"] += 1
        for name in self._some(list(self._services), 2):
            self._change(name)
        added = [self._add() for _ in range(self._chance.randint(1, 3))]
        begun = [each for name in added for each in self._services[name]]
        had_dns = bool(self._dns)
        if had_dns and self._chance.random() < 0.6:
            self._dns = []
            self.events["UDP gone"] += 1
        elif not had_dns:
            begun += self._add_dns()
        self.apply()
        for seat in self._seats:
            seat.wait_for_vip_ports(begun)
            if had_dns != bool(self._dns):
                seat.wait_for_conntrack("heard" if self._dns else "not needed")
        for name in added:
            self._call(name)
        if self._dns and not had_dns:
            self._ask(DNS_PORT)

    def change(self) -> None:
        """Let one or two Services change."""
        for name in self._some(list(self._services), 2):
            self._change(name)
        self.apply()

    def _add(self) -> str:
        self._number += 1
        name = f"app{self._number}"
        high, low = divmod(self._number, 250)
        vips = [f"10.71.{high}.{low + 1}"] + ([f"fd00:71::{self._number:x}"] if self._chance.random() < 0.4 else [])
        policy = self._chance.choice(list(Policy))
        ports = [self._lab.vip_port(vip, 80, service=name, policy=policy) for vip in vips]
        self._services[name] = ports
        self._set_backends(name)
        self.vip_ports_made += len(ports)
        self.events["Services come"] += 1
        return name

    def _change(self, name: str) -> None:
        if self._chance.random() < 0.3:
            ports = self._services[name]
            policy = Policy.LOCAL if ports[0].policy is Policy.CLUSTER else Policy.CLUSTER
            self._services[name] = [replace(each, policy=policy) for each in ports]
            self.vip_ports_made += len(ports)
            self.events["policies changed"] += 1
        else:
            self._set_backends(name)
            self.events["backends changed"] += 1

    def _set_backends(self, name: str) -> None:
        """Let it have any of the pods, none, pods that refuse, or one that is not there."""
        port = self._chance.choice([SERVED, SERVED, SERVED, UNSERVED])
        pods = self._some(self._lab.pods, len(self._lab.pods))
        ghost = self._chance.random() < 0.15
        changed = []
        for each in self._services[name]:
            vip = format_address(each.address)
            backends = tuple(pod.backend(vip, port) for pod in pods)
            if ghost and ":" not in vip:
                node = self._lab.nodes[0]
                backends = (Backend(pack_address(GHOST), port, node.name, node.zone, "default", "ghost"),)
            changed.append(replace(each, backends=backends))
        self._services[name] = changed

    def _add_dns(self) -> Service:
        """Let a UDP Service come, at a VIP of its own: no flow is like one that conntrack still knows."""
        self._number += 1
        high, low = divmod(self._number, 250)
        pods = self._some(self._lab.pods, len(self._lab.pods)) or self._lab.pods[:1]
        self._dns = [
            self._lab.vip_port(
                f"10.72.{high}.{low + 1}", port, service=f"dns{self._number}", transport=Transport.UDP,
                backends=pods, target_port=UDP_SERVED,
            )
            for port in (DNS_PORT, SECOND_DNS_PORT)
        ]  # fmt: skip
        self._dns_asked = set()
        self.vip_ports_made += 2
        self.events["UDP come"] += 1
        return self._dns

    # connections

    def connections(self) -> None:
        """Call some of the Services."""
        for name in self._some([*self._services, self._steady[0].service], 3):
            self._call(name)

    def _call(self, service: str) -> None:
        for each in self._services.get(service) or [each for each in self._steady if each.service == service]:
            timeout = LONG_SECONDS if self._chance.random() < 0.2 else SHORT_SECONDS
            vip, count = format_address(each.address), self._chance.randint(1, 8)
            self._note(service, self._lab.connect(vip, each.port, count, timeout=timeout))

    def _ask(self, port: int) -> None:
        """Begin UDP flows with one of its ports, once: each client port is then of one flow."""
        vip_port = next(each for each in self._dns if each.port == port)
        if port not in self._dns_asked:
            self._dns_asked.add(port)
            vip, count = format_address(vip_port.address), self._chance.randint(1, 20)
            self._note(vip_port.service, self._lab.client.send_udp(vip, port, count))
            self.events["UDP flows"] += count

    def _note(self, service: str, results: Sequence[Connection]) -> None:
        unknown = {result.error for result in results} & NEVER_SENT
        assert not unknown, f"the lab does not know whether it has sent: {unknown}"
        self.made[service] += len(results)
        for result in results:
            self.events["unanswered" if result.error == "timeout" else "refused" if result.error else "answered"] += 1

    # interfaces

    def interfaces(self) -> None:
        """Let an interface come, go, be renamed, go down and up, or move away and perhaps back."""
        names = list(self._interfaces)
        if not names or (len(names) < MOST_INTERFACES and self._chance.random() < 0.4):
            self._add_interface()
            return
        name = self._chance.choice(names)
        self._chance.choice([self._delete_interface, self._rename, self._flap, self._move])(name)

    def _add_interface(self) -> None:
        self._number += 1
        name, node = f"soak{self._number}", self._chance.choice(self._lab.nodes)
        node.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p"])
        for each in (name, f"{name}p"):
            node.run(["ip", "link", "set", each, "up"])
        self._interfaces[name] = node
        self.events["interfaces come"] += 1

    def _delete_interface(self, name: str) -> None:
        # By its other end, which is where it was made, wherever this one is.
        node = self._interfaces.pop(name)
        node.run(["ip", "link", "del", f"{name}p"])
        self.events["interfaces gone"] += 1

    def _rename(self, name: str) -> None:
        node, other = self._interfaces[name], f"{name}r"
        for old, new in ((f"{name}p", other), (other, f"{name}p")):
            node.run(["ip", "link", "set", old, "down"])
            node.run(["ip", "link", "set", old, "name", new])
            node.run(["ip", "link", "set", new, "up"])
        self.events["interfaces renamed"] += 1

    def _flap(self, name: str) -> None:
        node = self._interfaces[name]
        for state in ("down", "up"):
            node.run(["ip", "link", "set", f"{name}p", state])
        self.events["interfaces down and up"] += 1

    def _move(self, name: str) -> None:
        """Move it to a pod's namespace, and every other time back."""
        node = self._interfaces[name]
        away = node.pods[0]
        names = [text.partition("@")[0].split(": ")[1] for text in away.run(["ip", "-o", "link"]).stdout.splitlines()]
        if name in names:
            away.run(["ip", "link", "set", name, "netns", node.netns])
            node.run(["ip", "link", "set", name, "up"])
        else:
            node.run(["ip", "link", "set", name, "netns", away.netns])
        self.events["interfaces moved"] += 1

    # the sink, an agent

    def sink(self) -> None:
        """Let the sink be away for a while."""
        self._receiver.close()
        for action in self._some_of([self.services, self.interfaces, self.connections], 2):
            action()
        self._receiver.open()
        self.events["sink away"] += 1

    def kill(self) -> None:
        """SIGKILL to an agent; something happens before the next one begins, and while it does."""
        seat = self._seats[-1]
        if self._dns:
            seat.wait_for_conntrack("heard")
            time.sleep(2 * TICK_SECONDS)  # it notes once in each whether it hears
        seat.kill()
        if self._dns:
            self._ask(SECOND_DNS_PORT)
        blind = [self.interfaces, self.connections, self.change]
        for action in self._some_of(blind, 1):
            action()
        seat.begin()
        for action in self._some_of(blind, 1):
            action()
        seat.wait()
        self.events["kills"] += 1
        if self._dns:
            seat.wait_for_conntrack("heard")

    def _some(self, values: Sequence[T], most: int) -> list[T]:
        return self._chance.sample(values, self._chance.randint(0, min(most, len(values))))

    def _some_of(self, actions: list[Callable[[], None]], count: int) -> list[Callable[[], None]]:
        return self._chance.choices(actions, k=count)
