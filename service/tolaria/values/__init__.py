"""Plain values that cross between the lane and the run. No torch."""
