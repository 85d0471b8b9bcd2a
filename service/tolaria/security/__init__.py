"""Tokens, certificates and limits: who may call, how it is proved, and how often. No gRPC, no HTTP, no torch."""
