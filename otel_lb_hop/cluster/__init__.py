"""The only room that knows where the topology comes from: the VIP file (and, later, the API server)."""
