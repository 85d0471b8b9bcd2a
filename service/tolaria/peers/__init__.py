"""Tamiyo and Kasmina as Tolaria sees them: clients, signatures, verification of what comes back. Knows no torch."""
