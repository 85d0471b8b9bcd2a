"""Deadlines and circuit breakers. Knows nothing of what is being called."""
