"""Two-phase rollback: the coordinator, its participants and their protocol."""
