"""`python -m tests.demo`: the whole way once, from a client's SYN to the answer an operator wants, on one machine.

A laboratory of network namespaces with a real API server and kube-proxies, an agent on every node, an OTLP sink, a few
thousand connections; then tables made from nothing but the OTLP that arrived, and a comparison with what the clients
and pods themselves saw.
"""
