"""The status page on the metrics port: what it remembers of a run, how it renders it, and how it reaches viewers."""
