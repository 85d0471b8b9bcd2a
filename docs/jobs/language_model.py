"""A language model on a stream without an end: windows of characters from text files, by default Python's own library.

    tolaria serve --set preset=plain --set training.job=language_model:Job --set training.steps=400

The stream has a state, so that a rollback or a restart goes on at the same place.
"""

import sysconfig
from pathlib import Path

import torch
from torch import nn

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor, Ratio

BATCH, LENGTH, CHARACTERS = 16, 32, 128


class Stream:
    """Batches of windows of `LENGTH` + 1 characters: the files one after the other, again and again."""

    def __init__(self, *, training):
        found = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        self.files, self.file, self.start = [f for i, f in enumerate(found) if (i % 10 > 0) == training], 0, 0

    def __iter__(self):
        while True:
            text = torch.tensor(list(self.files[self.file].read_bytes())).clamp(max=CHARACTERS - 1)
            batches = text.unfold(0, LENGTH + 1, LENGTH).split(BATCH) if len(text) > LENGTH else ()
            while self.start < len(batches):
                self.start += 1
                yield batches[self.start - 1]
            self.file, self.start = (self.file + 1) % len(self.files), 0

    def state_dict(self):
        return {"file": self.file, "start": self.start}

    def load_state_dict(self, state):
        self.file, self.start = state["file"], state["start"]


class Network(nn.Module):
    """A GRU whose head is tied to the embedding."""

    def __init__(self, width=64):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(CHARACTERS, width), nn.GRU(width, width, batch_first=True)
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, tokens):
        return self.layers(self.embedding(tokens))[0] @ self.embedding.weight.T

    def loss(self, tokens, reduction="mean"):
        return nn.functional.cross_entropy(self(tokens[:, :-1]).mT, tokens[:, 1:], reduction=reduction)


class Job:
    def __init__(self, context: JobContext):
        self.seed = context.seed

    def build_model(self):
        return Network()

    def build_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=3e-3)

    def training_data(self):
        return LoaderCursor(Stream(training=True), seed=self.seed)

    def losses(self, model, batch: Batch):
        return {HOST: model.loss(batch.payload)}

    def validation_batches(self):
        return [Batch(tokens, len(tokens)) for tokens, _ in zip(Stream(training=False), range(20))]

    def evaluate(self, model, batch: Batch):
        loss_sum = float(model.loss(batch.payload, "sum"))
        metrics = {"perplexity": Ratio(loss_sum, LENGTH * batch.samples, exponential=True)}
        return Evaluation(loss_sum / LENGTH, samples=batch.samples, metrics=metrics)
