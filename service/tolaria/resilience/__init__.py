"""Calls with deadlines, circuit breakers and conservative mode."""
