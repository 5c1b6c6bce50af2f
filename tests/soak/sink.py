"""An OTLP endpoint that counts, by gRPC and HTTP, in a process of its own: `python -m tests.soak.sink ADDRESS`.

Each line on its standard input is a command (`open`, `close`, `tell`) and is answered by a line of JSON; it ends with
its input. `Sink` is the side that gives the commands.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.soak.tally import Tally
from tests.unit.otlp_sink import Answer, GrpcServer, HttpServer

if TYPE_CHECKING:
    from tests.lab.host import Host
    from tests.unit.otlp_sink import Received


class Told(NamedTuple):
    """What the sink has counted so far; the fields are those of `Tally`."""

    connections: dict[str, int]
    outcomes: dict[str, int]
    usage: dict[str, dict[str, int]]
    logs: dict[str, int]
    spans: dict[str, int]
    defects: list[str]
    anew: list[tuple[str, float]]
    requests: int


class Sink:
    """Runs the process on a host of the lab. Use it as a context; open on entry."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._process = host.popen(
            [sys.executable, "-m", "tests.soak.sink", host.address4], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            if self._process.stdin:
                self._process.stdin.close()

    def open(self) -> None:
        """Listen, on the same ports as before."""
        self._grpc, self._http = self._ask("open")

    def close(self) -> None:
        """Be away: ports and connections are closed."""
        self._ask("close")

    def told(self) -> Told:
        """Ask what has come."""
        return Told(**self._ask("tell"))

    def settings(self, *, http: bool) -> dict[str, str]:
        """Name the standard variables that make an agent send here."""
        port, protocol = (self._http, "http/protobuf") if http else (self._grpc, "grpc")
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self._host.address4}:{port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        }

    def _ask(self, command: str) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class _Counter:
    """What both servers do with a request."""

    tally: Tally
    lock = threading.Lock()
    requests = 0

    def _take(self, received: Received) -> Answer:
        message = received.message()
        with self.lock:
            self.tally.take(message)
            _Counter.requests += 1
        return Answer()


class _Grpc(_Counter, GrpcServer):
    pass


class _Http(_Counter, HttpServer):
    pass


def main(address: str) -> None:
    """Obey."""
    tally = Tally()
    servers = _Grpc(), _Http()
    for server in servers:
        server.tally, server.address = tally, address
    for line in sys.stdin:
        answer: Any = None
        if line == "open\n":
            for server in servers:
                server.start()
            answer = [server.port for server in servers]
        elif line == "close\n":
            for server in servers:
                server.stop()
        else:
            with _Counter.lock:
                answer = Told(
                    tally.connections(),
                    tally.by_outcome(),
                    tally.usage,
                    tally.logs,
                    tally.spans,
                    tally.defects,
                    tally.anew,
                    _Counter.requests,
                )._asdict()
        print(json.dumps(answer), flush=True)
    for server in servers:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1])
