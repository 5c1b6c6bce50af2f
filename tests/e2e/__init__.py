"""End to end: agents on the nodes of a lab, a real Collector on its mgmt host, and the lab's own truth beside them."""
