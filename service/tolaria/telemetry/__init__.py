"""Metrics, events, logs and the HTTP server of Prometheus and of health probes."""
