"""Version 1 of the contract, generated from proto/leyline/v1 by scripts/generate."""
