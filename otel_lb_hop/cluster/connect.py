"""Connections to the API server: configuration, TLS, credentials and proxies by the `kubernetes` package.

Of that package only what makes a connection is imported, not its 700 models: 2 MiB of an agent's memory instead of 20.
Answers are not asked for in gzip: packing 20 MB for each node of a cluster costs the API server more than it spares.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import time
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    ProtocolError,
    ReadTimeoutError,
    SSLError,
)

from otel_lb_hop import __version__
from otel_lb_hop.cluster.failure import Cause, ClusterError
from otel_lb_hop.slim_import import without_package_init

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from urllib3 import BaseHTTPResponse, PoolManager

    from otel_lb_hop.config import ApiConfig


def _whole_client(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - stands for a class of the package
    """Stand for the class that only a refresh of OIDC tokens needs, and that needs all models."""
    return importlib.import_module("kubernetes.client.api_client").ApiClient(*args, **kwargs)


def _slim(module: str) -> Any:  # noqa: ANN401 - modules of the package have no types
    """Import one module of the package without the rest of it."""
    with ExitStack() as stack:
        for name in ("kubernetes", "kubernetes.client", "kubernetes.utils", "kubernetes.config"):
            stack.enter_context(without_package_init(name))
        client = sys.modules["kubernetes.client"]
        if not hasattr(client, "Configuration"):
            vars(client)["Configuration"] = importlib.import_module("kubernetes.client.configuration").Configuration
            vars(client)["ApiClient"] = _whole_client
        return importlib.import_module(module)


# A head that breaks off would be told with a traceback; what follows from it is told here.
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_SECONDS: Final = 5.0
CHUNK_BYTES: Final = 2**16
MAX_SMALL_BYTES: Final = 2**20
SMALL_SECONDS: Final = 10.0


def connector(
    api: ApiConfig,
    environ: Mapping[str, str] = os.environ,
    account: Path = SERVICE_ACCOUNT,
) -> Callable[[], Connection]:
    """Make the function that reads configuration and credentials, anew each time, and makes a connection of them.

    That function raises ClusterError for what is missing or wrong.
    """
    # Imported here and once: in the threads that connect they would meet each other's half-done imports.
    configure = _slim("kubernetes.client.configuration").Configuration
    client = _slim("kubernetes.client.rest").RESTClientObject
    loader = _slim("kubernetes.config.incluster_config").InClusterConfigLoader
    load_file = _slim("kubernetes.config.kube_config").load_kube_config if api.kubeconfig else None

    def connect() -> Connection:
        configuration = configure()
        configuration.keep_alive = True
        configuration.connection_pool_maxsize = 1
        try:
            if load_file:
                # What a plugin refreshed is not written back: the agent changes nobody's files.
                load_file(api.kubeconfig, client_configuration=configuration, persist_config=False)
            else:
                files = str(account / "token"), str(account / "ca.crt")
                loader(*files, environ=environ).load_and_set(configuration)
            return Connection(configuration, client(configuration).pool_manager)
        except Exception as error:  # the package raises whatever a wrong file makes it stumble over
            source = api.kubeconfig or "the pod's ServiceAccount"
            text = f"no configuration for the API server from {source}: {error}"
            raise ClusterError(text, Cause.UNREACHABLE) from error

    return connect


class Connection:
    """A way to the API server for one request at a time, made anew after credentials changed. Raises ClusterError."""

    def __init__(self, configuration: Any, manager: PoolManager) -> None:  # noqa: ANN401 - the package has no types
        self._configuration = configuration
        self._socket: Any = None
        self._manager = manager
        self._manager.pool_classes_by_scheme = {
            "http": self._tracked(HTTPConnectionPool),
            "https": self._tracked(HTTPSConnectionPool),
        }

    def get(self, target: str, head_seconds: float, body_seconds: float) -> Answer:
        """Ask, and wait for an answer to begin for `head_seconds`; each part of it may then take `body_seconds`."""
        headers = {"Accept": "application/json", "User-Agent": f"otel-lb-hop/{__version__}"}
        try:
            # Reads the token again when it is due.
            for setting in self._configuration.auth_settings().values():
                headers[setting["key"]] = setting["value"].strip()
            response = self._manager.request(
                "GET",
                self._configuration.host + target,
                headers=headers,
                timeout=Timeout(connect=min(CONNECT_SECONDS, head_seconds), read=head_seconds),
                preload_content=False,
                redirect=False,
                retries=False,
            )
            self._socket.settimeout(body_seconds)
        except ReadTimeoutError as error:
            raise ClusterError(f"{self._host} does not answer in {head_seconds:g} s", Cause.BROKEN) from error
        except Exception as error:  # also whatever a plugin for credentials raises
            raise self._unreachable(error) from error
        return Answer(response)

    def abort(self) -> None:
        """Break off what another thread is waiting for."""
        if self._socket is not None:
            with suppress(OSError):
                # Not SSLSocket's own, which takes the TLS state away from under the reader.
                socket.socket.shutdown(getattr(self._socket, "socket", self._socket), socket.SHUT_RDWR)

    def close(self) -> None:
        """Close what is kept open for the next request."""
        self._manager.clear()

    @property
    def _host(self) -> str:
        return str(self._configuration.host)

    def _tracked(self, pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
        """Let the pool's connections tell their socket, whose time-out changes once an answer has begun."""
        track = self

        class Tracked(pool.ConnectionCls):  # type: ignore[name-defined,misc]
            def connect(self) -> None:
                try:
                    super().connect()
                except TimeoutError:  # else it would pass for an answer that does not come
                    raise ConnectTimeoutError(f"no TLS handshake in {CONNECT_SECONDS:g} s") from None
                track._socket = self.sock

        return type("TrackedPool", (pool,), {"ConnectionCls": Tracked})

    def _unreachable(self, error: Exception) -> ClusterError:
        match error:
            case SSLError():
                text = f"TLS with {self._host} failed: {error}; is the CA certificate the cluster's?"
            case NameResolutionError():
                text = f"the name of {self._host} cannot be resolved; does DNS work here?"
            case ProtocolError(args=(_, HTTPException() as inner)) if not isinstance(inner, OSError):
                text = f"{self._host} answers what is no HTTP: {_reason(error)}"
            case ValueError() if not isinstance(error, (HTTPError, OSError)):
                # What http.client says of a header that it does not send holds the token.
                text = f"no request to {self._host} can be made: are the credentials one line of text?"
            case _:
                text = f"{self._host} cannot be reached: {_reason(error)}"
        return ClusterError(text, Cause.UNREACHABLE)


class Answer:
    """An answer that has begun."""

    def __init__(self, response: BaseHTTPResponse) -> None:
        self._response = response
        self.status = response.status
        self.retry_after = response.headers.get("Retry-After")

    def read(self) -> bytes:
        """Answer what comes next, as soon as there is something; nothing at the end."""
        try:
            return self._response.read1(CHUNK_BYTES)
        except ReadTimeoutError as error:
            raise ClusterError("the answer stopped: nothing more came in time", Cause.BROKEN) from error
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            raise ClusterError(f"the answer stopped: {_reason(error)}", Cause.BROKEN) from error

    def read_small(self) -> bytes:
        """Answer a body that is small, such as a refusal's; of any other, what comes in reasonable time and size."""
        body = b""
        deadline = time.monotonic() + SMALL_SECONDS
        with suppress(ClusterError):
            while len(body) < MAX_SMALL_BYTES and time.monotonic() < deadline and (chunk := self.read()):
                body += chunk
        return body

    def close(self) -> None:
        """Give the connection back if all was read, else close it."""
        self._response.close()


def _reason(error: Exception) -> str:
    """Say what urllib3's errors say, without their wrapping, in ASCII: it may hold what a server has sent."""
    inner = (each for each in (error.__cause__, *error.args) if isinstance(each, (OSError, HTTPException)))
    reason = next(inner, error)
    return ascii(str(getattr(reason, "strerror", None) or reason))[1:-1]
