"""The service's side of a lane in a process of its own."""
