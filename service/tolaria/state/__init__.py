"""The training state: its definition, capture into images, and restore."""
