"""Fakes and tiny jobs that many tests share."""
