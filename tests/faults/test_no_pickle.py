from __future__ import annotations

import re
from pathlib import Path

import tolaria

FORBIDDEN = re.compile(
    r"\b(c?pickle|cloudpickle|dill|shelve|marshal|joblib|jsonpickle)\b(?!d)"
    r"|\b(torch|th)\.(load|save)\b|\b(np|numpy)\.(load|save)z?\b|allow_pickle|torch\.jit\.load"
    r"|\b(broadcast|gather|all_gather|scatter|send|recv)_object(_list)?\b|\bdistributed\.checkpoint"
    r"|\bc10d\b|dynamic_rendezvous|\bmultiprocessing\b(?!\.api import LogsDest)|\bfrom_pickle\b|weights_only"
)


ALLOWED = {
    # An export for PyTorch, if that format is asked for, by a child process that ends with it; and back, tensors only.
    "tolaria/export/conversion.py": "torch.save(tensors, content)",
    "tolaria/export/loading.py": 'tensors |= torch.load(place / name, map_location="cpu", weights_only=True)',
}


def test_nothing_in_the_service_can_read_or_write_a_pickle() -> None:
    """No line of code of any module names pickle, what is made of it, or a function that reads or writes it."""
    service = Path(tolaria.__file__).parents[1]
    sources = sorted(service.rglob("*.py"))
    assert len(sources) > 150
    found = [
        f"{source.relative_to(service)}:{number}: {line.strip()}"
        for source in sources
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if line.strip() != ALLOWED.get(str(source.relative_to(service)))
        if FORBIDDEN.search(line) and not line.lstrip().startswith(("#", '"', "Not "))
    ]
    assert found == []


def test_the_search_finds_what_it_is_for() -> None:
    """Each way to a pickle is seen."""
    for line in (
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "np.load(x)",
        "shelve.open(x)",
        "joblib.dump",
        "dist.broadcast_object_list(x)",
        "dist.all_gather_object(x, y)",
        'RendezvousParameters("c10d", x)',
        "from torch.distributed.checkpoint import save",
        "from torch.multiprocessing import Queue",
    ):
        assert FORBIDDEN.search(line), line
