"""Channels to peers, set up to come back soon after a peer has restarted."""

from __future__ import annotations

import grpc.aio

ANSWER_BYTES_MAX = 4 * 1024 * 1024


def peer_channel(target: str) -> grpc.aio.Channel:
    """A channel of its own to `target`. The caller closes it."""
    return grpc.aio.insecure_channel(
        target,
        options=[
            # gRPC's own backoff reaches two minutes: a peer that is back would be absent for as long.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", ANSWER_BYTES_MAX),
            ("grpc.enable_retries", 0),
        ],
    )
