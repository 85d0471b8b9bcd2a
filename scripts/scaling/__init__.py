"""What groups of ranks cost beyond one machine: tables computed from measured costs, and simulated failures."""
