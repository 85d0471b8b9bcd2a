"""Several tasks that share layers: the digit, and how much ink it has; conflicting gradients are projected by PCGrad.

tolaria serve --set preset=plain --set training.job=tasks:Job --set training.epochs=10
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor


class Network(nn.Module):
    """A shared trunk with a head for each task."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.digit, self.ink = nn.Linear(32, 10), nn.Linear(32, 1)

    def forward(self, images):
        hidden = self.trunk(images)
        return self.digit(hidden), self.ink(hidden).squeeze(1)


def digits():
    """Returns data for training and for validation: images of shape (64,), the digit, and the mean of the pixels."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    kept = torch.arange(len(images)) % 5 != 0
    labels, ink = torch.tensor(data.target), images.mean(1)
    return [TensorDataset(images[part], labels[part], ink[part]) for part in (kept, ~kept)]


class Job:
    def __init__(self, context: JobContext):
        self.seed = context.seed
        self.training, self.validation = digits()

    def build_model(self):
        return Network()

    def build_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=3e-3)

    def training_data(self):
        return LoaderCursor(DataLoader(self.training, batch_size=32, shuffle=True), seed=self.seed)

    def losses(self, model, batch: Batch):  # one loss for each task; the first task is called HOST
        images, labels, ink = batch.payload
        scores, predicted = model(images)
        return {HOST: functional.cross_entropy(scores, labels), "ink": 10 * functional.mse_loss(predicted, ink)}

    def validation_batches(self):
        return [Batch(payload, len(payload[1])) for payload in DataLoader(self.validation, batch_size=120)]

    def evaluate(self, model, batch: Batch):
        images, labels, ink = batch.payload
        scores, predicted = model(images)
        loss_sum = float(functional.cross_entropy(scores, labels, reduction="sum"))
        correct = int((scores.argmax(1) == labels).sum())
        return Evaluation(
            loss_sum, correct, batch.samples, metrics={"ink_error": float((predicted - ink).abs().mean())}
        )
