"""Jobs made by the adapters, from real modules of Lightning and tiny models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
)

from tolaria.adapters.hf import HuggingFaceJob
from tolaria.adapters.lightning import LightningJob
from tolaria.jobs import JobContext


def line_data(samples: int = 24) -> TensorDataset:
    """Points near a line."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(samples, 3, generator=generator)
    return TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1)


class LitLine(pl.LightningModule):
    """A regression as the documentation of Lightning writes one."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"error": (self(x) - y).abs().mean()}, on_step=True)
        self.seen.append((self.current_epoch, batch_idx))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", functional.mse_loss(self(x), y))
        self.log("accuracy", ((self(x) - y).abs() < 0.5).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(line_data(), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(line_data(10), batch_size=4)


def lit_job(context: JobContext) -> LightningJob:
    """The module with its own loaders."""
    return LightningJob(context, module=LitLine)


def text_rows(count: int = 20) -> list[dict[str, Any]]:
    """Rows as a tokenized data set has them, with a column that no model takes."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(2, 12, (count, 6), generator=generator)
    return [{"input_ids": row.tolist(), "attention_mask": [1] * 6, "text": "unused"} for row in codes]


class _Padding:
    """What a collator needs of a tokenizer: here nothing has to be padded."""

    pad_token_id = 0
    pad_token = "<pad>"
    mask_token = None
    padding_side = "right"

    def pad(self, rows: list[Mapping[str, Any]], **_: Any) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def causal_model() -> nn.Module:
    """A tiny GPT-2 with tied embeddings."""
    size = {"n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, bos_token_id=0, eos_token_id=0, **size))


def causal_job(context: JobContext) -> HuggingFaceJob:
    """A language model, whose labels the collator makes."""
    collator = DataCollatorForLanguageModeling(_Padding(), mlm=False)
    data = {"train": text_rows(), "validation": text_rows(6)}
    return HuggingFaceJob(
        context, model=causal_model, data=data, collator=collator, batch_size=4, learning_rate=0.01, weight_decay=0.1
    )


def classifier_job(context: JobContext) -> HuggingFaceJob:
    """A classifier with the default collator; its rows have a column `label`."""
    rows = [{**row, "label": number % 2} for number, row in enumerate(text_rows())]
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=12, max_position_embeddings=8, **size)
    return HuggingFaceJob(
        context,
        model=lambda: BertForSequenceClassification(config),
        data={"train": rows, "test": rows[:8]},
        batch_size=4,
        metrics=lambda output, batch: {"margin": float((output.logits[:, 1] - output.logits[:, 0]).abs().mean())},
    )
