"""Reference Tamiyo and Kasmina: small peers that come with Tolaria. Knows no trainer, imports no torch."""
