"""Metrics, events, logs and the HTTP server that shows them. Takes no decisions."""
