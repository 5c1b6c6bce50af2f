"""The hosts of a laboratory: run programs in them, make connections from them, ask them what they saw."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from otel_lb_hop.model import Backend, is_ipv4, pack_address
from tests.lab.netns import in_netns, write_sysctls
from tests.lab.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")
Stream: TypeAlias = int | IO[str] | None

POD_NAMESPACE = "default"
_SCRIPTS = Path(__file__).parent
_PYTHON = [sys.executable, "-I", "-S"]


class Connection(NamedTuple):
    """What became of one connection, as its client saw it; `error` is "timeout" or the name of an errno."""

    client_address: str
    client_port: int
    ok: bool
    error: str
    connect_seconds: float


class Accepted(NamedTuple):
    """One connection as the pod saw it: the peer is the SNAT source, or the client itself."""

    peer_address: str
    peer_port: int
    local_address: str
    local_port: int


class Conntrack(NamedTuple):
    """One conntrack entry; `state` is empty for a transport without states."""

    state: str
    source: str
    source_port: int
    destination: str
    destination_port: int
    reply_source: str
    reply_source_port: int
    reply_destination: str
    reply_destination_port: int


@dataclass(frozen=True)
class Host:
    """One network namespace of the lab and the addresses others reach it by."""

    name: str
    netns: str
    address4: str
    address6: str
    directory: Path

    def in_netns(self, work: Callable[[], T]) -> T:
        """Call `work` in a thread inside this host's namespace and return its result."""
        return in_netns(self.netns, work)

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program here; the caller owns it, the end of the lab kills it."""
        return self.in_netns(
            lambda: subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, text=True)
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 30,
        text: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here to its end, with `text` as its standard input."""
        stdin = subprocess.DEVNULL if text is None else subprocess.PIPE
        process = self.popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        with process:
            try:
                output, errors = process.communicate(text, timeout=timeout * PATIENCE)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            failure = subprocess.CalledProcessError(process.returncode, list(argv), output, errors)
            failure.add_note(f"in {self.netns}: {errors}")
            raise failure
        return subprocess.CompletedProcess(list(argv), process.returncode, output, errors)

    def sysctl(self, name: str, value: str | int) -> None:
        """Set a sysctl under `net.` of this host's namespace, and of no other."""
        write_sysctls(self.netns, {name: str(value)})

    def bpffs(self) -> Path:
        """Return a directory with a bpffs of this host's own, to pin in; it ends with the lab."""
        path = self.directory / f"bpf-{self.name}"
        if not path.is_dir():
            path.mkdir()
            self.run(["mount", "-t", "bpf", "bpffs", str(path)])
        return path

    def connect(
        self,
        address: str,
        port: int,
        count: int = 1,
        *,
        concurrency: int = 8,
        reset: bool = True,
        timeout: float = 3.0,
    ) -> list[Connection]:
        """Make TCP connections from here; `timeout` is each one's own, `reset` closes with RST."""
        words = address, port, count, concurrency, timeout, "reset" if reset else "close"
        return self._traffic("tcp", *words, seconds=60 + count * timeout / concurrency)

    def send_udp(
        self, address: str, port: int, flows: int = 1, *, concurrency: int = 8, timeout: float = 3.0
    ) -> list[Connection]:
        """Send one datagram for each UDP flow, each from a port of its own, and wait for the answer as long."""
        words = address, port, flows, concurrency, timeout, "close"
        return self._traffic("udp", *words, seconds=60 + flows * timeout / concurrency)

    def conntrack(self, transport: str = "tcp") -> list[Conntrack]:
        """Return the conntrack entries of this host, IPv4 and IPv6."""
        families = ["ipv4", "ipv6"]
        texts = [self.run(["conntrack", "-L", "-p", transport, "-f", family]).stdout for family in families]
        return [parse_conntrack(line) for text in texts for line in text.splitlines()]

    def _traffic(self, *words: object, seconds: float) -> list[Connection]:
        argv = [*_PYTHON, str(_SCRIPTS / "traffic.py"), *map(str, words)]
        output = self.run(argv, timeout=seconds).stdout
        return [Connection(*result) for result in json.loads(output)]


@dataclass(frozen=True)
class Pod(Host):
    """A pod: takes connections on ports it serves and remembers each."""

    node: str
    zone: str

    def serve(self, port: int) -> None:
        """Take TCP connections on `port` over both families, from now until the lab ends."""
        self._serve("tcp", port)

    def serve_udp(self, port: int) -> None:
        """Answer UDP datagrams on `port` over both families, from now until the lab ends."""
        self._serve("udp", port)

    def accepted(self, transport: str = "tcp") -> list[Accepted]:
        """Every connection taken so far on any port; complete for connections that have ended at the client.

        With UDP every datagram.
        """
        logs = self._complete_logs(transport)
        return [Accepted(*json.loads(line)) for log in logs for line in log.read_text().splitlines()]

    def backend(self, vip: str, port: int, *, ready: bool = True) -> Backend:
        """Describe this pod as a backend of a VIP, in the VIP's address family."""
        address = pack_address(self.address4 if is_ipv4(pack_address(vip)) else self.address6)
        return Backend(address, port, self.node, self.zone, POD_NAMESPACE, self.name, ready)

    def _serve(self, transport: str, port: int) -> None:
        files = [str(self.directory / f"{self.name}-{transport}-{port}.{kind}") for kind in ("log", "control")]
        self.run([*_PYTHON, str(_SCRIPTS / "server.py"), transport, str(port), *files])

    def _complete_logs(self, transport: str) -> list[Path]:
        logs = sorted(self.directory.glob(f"{self.name}-{transport}-*.log"))
        for log in logs:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
                server.settimeout(10)
                server.connect(str(log.with_suffix(".control")))
                server.recv(64)
        return logs


@dataclass(frozen=True)
class Node(Host):
    """A node: address4 and address6 are its fabric (eth0) addresses, `addresses` all it may use as SNAT source."""

    zone: str
    pods: tuple[Pod, ...]
    uplink4: str
    uplink6: str
    mgmt4: str
    mgmt6: str
    addresses: frozenset[str]


def parse_conntrack(line: str) -> Conntrack:
    """Read one line of `conntrack -L`: the first of each key is the original direction, the second the reply's."""
    fields = re.findall(r"(src|dst|sport|dport)=(\S+)", line)
    original, reply = dict(fields[:4]), dict(fields[4:8])
    state = re.search(r" ([A-Z][A-Z_0-9]+) src=", line)
    return Conntrack(
        state[1] if state else "",
        original["src"],
        int(original["sport"]),
        original["dst"],
        int(original["dport"]),
        reply["src"],
        int(reply["sport"]),
        reply["dst"],
        int(reply["dport"]),
    )
