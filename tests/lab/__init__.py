"""A laboratory of network namespaces: a client, a router with ECMP, nodes in zones of their own, pods.

    with Lab() as lab:
        pods = [node.pods[0] for node in lab.nodes]
        for pod in pods:
            pod.serve(8080)
        lab.apply([lab.vip_port("10.0.10.0", 80, backends=pods, target_port=8080)])
        lab.connect("10.0.10.0", 80, 23)

It is made of real kernel routing, NAT and TCP; nothing of it touches the root namespace, and nothing is left when
its owner ends, however it ends.
"""

from tests.lab.host import Accepted, Connection, Conntrack, Host, Node, Pod
from tests.lab.lab import Lab, LabError

__all__ = ["Accepted", "Connection", "Conntrack", "Host", "Lab", "LabError", "Node", "Pod"]
