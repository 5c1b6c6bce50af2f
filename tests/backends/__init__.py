"""Real Prometheus, Loki and Tempo behind a real Collector, fed by the lab's real traffic, and what is asked of them."""
