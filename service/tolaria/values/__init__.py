"""Value types that cross the border between the lane and the run: frozen dataclasses of plain values, without torch."""
