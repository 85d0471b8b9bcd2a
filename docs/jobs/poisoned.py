"""Poisoned data: some samples are NaN, and a shard on the way has huge values; nothing of it may ruin the model.

    tolaria serve --set preset=plain --set health.policy=full --set training.job=poisoned:Job --set training.epochs=10

Batches that are not finite are skipped, and so is a single extreme one; after several the model is rolled back to its
newest proven state, and the batches concerned are left out. `tolaria incidents` lists what happened.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor

BATCH = 16


def digits():
    """Returns poisoned data for training, whose batches are blocks of 16, and sound data for validation."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    kept = torch.arange(len(images)) % 5 != 0
    training = images[kept].clone()
    training[100] = training[900] = torch.nan  # two samples that cannot be read
    training[40 * BATCH : 46 * BATCH] *= -300  # a shard of six batches that was written wrongly
    return TensorDataset(training, labels[kept]), TensorDataset(images[~kept], labels[~kept])


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Job:
    def __init__(self, context: JobContext):
        self.seed = context.seed
        self.training, self.validation = digits()

    def build_model(self):
        return network()

    def build_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def training_data(self):  # read in order, as a file is
        return LoaderCursor(DataLoader(self.training, batch_size=BATCH), seed=self.seed)

    def losses(self, model, batch: Batch):
        images, labels = batch.payload
        return {HOST: functional.cross_entropy(model(images), labels)}

    def validation_batches(self):
        return [Batch(payload, len(payload[1])) for payload in DataLoader(self.validation, batch_size=120)]

    def evaluate(self, model, batch: Batch):
        images, labels = batch.payload
        logits = model(images)
        loss_sum = float(functional.cross_entropy(logits, labels, reduction="sum"))
        return Evaluation(loss_sum, int((logits.argmax(1) == labels).sum()), batch.samples)
