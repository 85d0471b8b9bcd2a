"""Value types that pass between the lane and the run: frozen dataclasses of plain values, without torch."""
