"""The admin RPCs: validate, hand over, answer. Knows no torch."""
