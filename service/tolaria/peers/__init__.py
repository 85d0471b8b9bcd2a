"""Clients of Tamiyo and Kasmina, and the verification of what they answer."""
