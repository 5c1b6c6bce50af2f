"""otel-lb-hop: which node took a LoadBalancer connection in, where it went, and what that hop cost."""

__version__ = "0.1.0"
