"""Reads all Services and EndpointSlices once and prints what that took: `python -m tests.bench.lists ours KUBECONFIG`.

One way in each process: `ours` is the agent's source until it is synced, `typed` the API classes of `kubernetes`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_SECONDS = 0.05


def ours(kubeconfig: str) -> Callable[[], int]:
    """Make ready the agent's way; Nodes are read as well."""
    from otel_lb_hop.cluster.api_source import ApiSource  # noqa: PLC0415 - each way only with what it needs
    from otel_lb_hop.cluster.connect import connector  # noqa: PLC0415
    from otel_lb_hop.config import ApiConfig  # noqa: PLC0415

    news = threading.Event()
    source = ApiSource(connector(ApiConfig(kubeconfig)), "node1", news.set)

    def read() -> int:
        source.start()
        while not all(state.synced for state in source.states().values()):
            news.wait(LOOK_SECONDS)
            news.clear()
        return len(source.take(sys.maxsize))

    return read


def typed(kubeconfig: str) -> Callable[[], int]:
    """Make ready the package's way: an object of a class for everything in the answer."""
    from kubernetes import client, config  # noqa: PLC0415, TID251 - what the agent's way is compared with

    config.load_kube_config(kubeconfig)
    core, discovery = client.CoreV1Api(), client.DiscoveryV1Api()

    def read() -> int:
        services = core.list_service_for_all_namespaces(resource_version="0").items
        slices = discovery.list_endpoint_slice_for_all_namespaces(resource_version="0").items
        return len(services) + len(slices)

    return read


def main(words: list[str]) -> None:
    """Print the CPU seconds (user and system, all threads) and the number of objects."""
    way, kubeconfig = words
    read = {"ours": ours, "typed": typed}[way](kubeconfig)
    before = time.process_time()
    objects = read()
    print(json.dumps([time.process_time() - before, objects]))


if __name__ == "__main__":
    main(sys.argv[1:])
