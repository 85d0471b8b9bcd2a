"""Jobs whose models are taken out of a run: with tied weights, with batch statistics, and of `transformers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, TensorCursor
from tolaria.seeds import SeedSlot

VOCABULARY, WIDTH, LENGTH = 12, 8, 6


class TiedGpt(nn.Module):
    """A causal transformer whose head is its embedding, with a mask that `state_dict` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.slot = SeedSlot("tokens", features=WIDTH, layout="sequence")
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.triu(torch.full((LENGTH, LENGTH), -1e9), 1), persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:  # noqa: N803 - the shape suffix: batch, time
        """Returns logits."""
        h = self.embedding(tokens_BT[:, :LENGTH])
        mixed, _ = self.attention(h, h, h, attn_mask=self.mask, need_weights=False)
        logits: Tensor = self.head(self.slot(h + mixed))
        return logits


class TokensJob:
    """Predicts the next of random tokens."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.tokens = torch.randint(VOCABULARY, (24, LENGTH + 1), generator=torch.Generator().manual_seed(1))

    def build_model(self) -> nn.Module:
        return TiedGpt()

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-2)

    def training_data(self) -> TensorCursor:
        return TensorCursor((self.tokens,), batch_size=8, seed=self.context.seed)

    def _loss(self, model: nn.Module, tokens: Tensor, reduction: str) -> Tensor:
        logits = model(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        (tokens,) = batch.payload
        return {HOST: self._loss(model, tokens, "mean")}

    def validation_batches(self) -> Iterable[Batch]:
        return [Batch((self.tokens,), len(self.tokens))]

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        (tokens,) = batch.payload
        return Evaluation(float(self._loss(model, tokens, "sum")), 0, batch.samples)


class ImagesJob(TokensJob):
    """Classifies random images by a network with batch statistics, whose slot is between two linear layers."""

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(32, 3, 6, 6, generator=generator)
        self.labels = torch.randint(4, (32,), generator=generator)

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            SeedSlot("filters", features=8, layout="image"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            SeedSlot("rectified", features=8, layout="image"),
            nn.Conv2d(8, 4, 3),
            nn.Flatten(),
            nn.Linear(64, 4),
        )

    def training_data(self) -> TensorCursor:
        return TensorCursor((self.images, self.labels), batch_size=8, seed=self.context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        images, labels = batch.payload
        return {HOST: functional.cross_entropy(model(images), labels)}

    def validation_batches(self) -> Iterable[Batch]:
        return [Batch((self.images, self.labels), len(self.images))]

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        images, labels = batch.payload
        logits = model(images)
        right = int((logits.argmax(1) == labels).sum())
        return Evaluation(float(functional.cross_entropy(logits, labels, reduction="sum")), right, batch.samples)


class PretrainedJob(TokensJob):
    """Trains a small GPT-2 of `transformers`, whose head is tied to its embedding."""

    def build_model(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return GPT2LMHeadModel(config)

    def _loss(self, model: nn.Module, tokens: Tensor, reduction: str) -> Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


class WrappedPretrainedJob(PretrainedJob):
    """The same inside another module, with a layer that is not the library's."""

    def build_model(self) -> nn.Module:
        return nn.ModuleDict({"gpt": super().build_model(), "extra": nn.Linear(2, 2)})

    def _loss(self, model: nn.Module, tokens: Tensor, reduction: str) -> Tensor:
        assert isinstance(model, nn.ModuleDict)
        return super()._loss(model["gpt"], tokens, reduction) + next(model["extra"].parameters()).sum() * 0
