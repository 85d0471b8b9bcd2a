"""The service's side of a lane in a separate process."""
