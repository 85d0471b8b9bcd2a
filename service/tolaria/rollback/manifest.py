"""A checkpoint's manifest: what it holds, of which run and step, and the digest of every piece and of itself.

Owns the JSON form. A manifest that parses has been proved whole: every one of its bytes is covered by its own digest.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final, cast

import xxhash

from tolaria.rollback.digest import Fingerprint, TensorSpec, combine
from tolaria.rollback.encoding import canonical_json
from tolaria.values.training import Position

FORMAT: Final = 1


class ManifestError(Exception):
    """Raised when bytes are not a manifest of this format; the message says why."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself. `metric` is the number that decides which one is best; None: never best."""

    checkpoint_id: str
    run_id: str
    position: Position
    created_at_ns: int
    metric: float | None
    values_bytes: int
    specs: tuple[TensorSpec, ...]
    fingerprint: Fingerprint

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size_bytes for spec in self.specs)

    def to_bytes(self) -> bytes:
        """Canonical JSON, its own digest included."""
        body = {
            "format": FORMAT,
            "checkpoint_id": self.checkpoint_id,
            "run_id": self.run_id,
            "global_step": self.position.global_step,
            "epoch": self.position.epoch,
            "created_at_ns": self.created_at_ns,
            "metric": self.metric,
            "values": [self.values_bytes, self.fingerprint.values],
            "tensors": [[s.name, s.dtype, list(s.shape), self.fingerprint.tensors[s.name]] for s in self.specs],
            "digest": self.fingerprint.total,
        }
        return canonical_json({**body, "manifest_digest": xxhash.xxh3_128_hexdigest(canonical_json(body))})


def parse_manifest(content: bytes) -> Manifest:
    """The manifest in these bytes.

    Raises:
        ManifestError: they are not exactly what `to_bytes` makes, or of another format.
    """
    try:
        document = cast("dict[str, Any]", json.loads(content))
        if canonical_json(document) != content:
            raise ManifestError("it is not in canonical form")
        found = document.pop("manifest_digest")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ManifestError("it is not a JSON object with a digest") from error
    if found != xxhash.xxh3_128_hexdigest(canonical_json(document)):
        raise ManifestError("its digest is another")
    if document.get("format") != FORMAT:
        raise ManifestError(f"format {document.get('format')} is not {FORMAT}")
    try:
        return _from_document(document)
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"a field is missing or has another form: {error}") from error


def _from_document(document: dict[str, Any]) -> Manifest:
    specs = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape, _ in document["tensors"])
    if any(spec.size_bytes < 0 for spec in specs):
        raise ManifestError("a tensor has a negative size")
    values_bytes, values_digest = document["values"]
    return Manifest(
        checkpoint_id=document["checkpoint_id"],
        run_id=document["run_id"],
        position=Position(document["global_step"], document["epoch"]),
        created_at_ns=document["created_at_ns"],
        metric=document["metric"],
        values_bytes=values_bytes,
        specs=specs,
        fingerprint=Fingerprint({row[0]: row[3] for row in document["tensors"]}, values_digest, document["digest"]),
    )


def totals_agree(manifest: Manifest, values: bytes) -> bool:
    """Whether the digest over all is the one that follows from the tensors' digests and `values`."""
    return combine(manifest.fingerprint.tensors, values).total == manifest.fingerprint.total
