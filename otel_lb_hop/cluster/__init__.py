"""The only room that knows where the topology comes from: the API server and the VIP file."""
