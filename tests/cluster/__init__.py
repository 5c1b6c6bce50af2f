"""The laboratory with a real control plane: etcd, kube-apiserver and, on each node, kube-proxy.

    with Lab() as lab, ControlPlane(lab) as plane:
        plane.apply(*map(objects.node, lab.nodes), *objects.web(...))
        with plane.kube_proxies(lab.nodes, Mode.NFTABLES):
            ...

No kubelet and no controllers: Nodes, Services, their VIPs and EndpointSlices are what a test writes.
"""
