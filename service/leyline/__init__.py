"""The Leyline contract: generated messages, enums and gRPC stubs. Never imports torch."""
