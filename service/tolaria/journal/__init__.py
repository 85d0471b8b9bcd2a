"""The journal: an SQLite audit trail of runs, checkpoints, commands, rollbacks, emergencies and faults."""
