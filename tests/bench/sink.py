"""An OTLP/gRPC endpoint that takes everything and looks at nothing: `python -m tests.bench.sink ADDRESS`.

Prints its port once it listens; runs until it is killed.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc


class _Everything(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        del handler_call_details
        return grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")


def main(address: str) -> None:
    """Serve."""
    server = grpc.server(
        ThreadPoolExecutor(4), handlers=[_Everything()], options=[("grpc.max_receive_message_length", -1)]
    )
    print(server.add_insecure_port(f"{address}:0"), flush=True)
    server.start()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
