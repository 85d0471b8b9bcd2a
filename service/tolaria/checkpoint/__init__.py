"""Durable checkpoints: file formats, the store, the background writer, retention and inspection."""
