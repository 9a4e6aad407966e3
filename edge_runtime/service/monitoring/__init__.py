"""What the service reports about itself: events, gauges, the dashboard state, and Prometheus metrics."""
