"""SCTP associations: `serve OWN PORT`, or `call OWN ADDRESS PORT COUNT SECONDS`, which prints who met whom as JSON.

For each association that was answered: the client's address and port as it knows them, then as the server does, and
the server's own address.
"""

from __future__ import annotations

import json
import socket
import sys

SCTP = 132


def serve(own: str, port: int) -> None:
    """Tell everyone who comes by which addresses they met; until killed."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, SCTP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((own, port))
        listener.listen(64)
        print("ready", flush=True)
        while True:
            association, peer = listener.accept()
            with association:
                association.sendall(json.dumps([*peer, association.getsockname()[0]]).encode())
                association.recv(1)  # until the client has closed


def call(own: str, address: str, port: int, count: int, seconds: float) -> None:
    """Associate so often, one after another."""
    met = []
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, SCTP) as association:
            association.settimeout(seconds)
            association.bind((own, 0))
            try:
                association.connect((address, port))
                met.append([*association.getsockname(), *json.loads(association.recv(256))])
            except OSError:
                continue
    print(json.dumps(met))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        call(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]))
