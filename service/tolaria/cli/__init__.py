"""The `tolaria` command: runs the service, asks a running one, shows what it does. Must not know torch."""
