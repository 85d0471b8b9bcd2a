"""Images with augmentation in worker processes: a convolutional network with BatchNorm on handwritten digits.

tolaria serve --set preset=plain --set training.job=images:Job --set training.epochs=10
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor


class Digits(Dataset):
    """Images of shape (1, 8, 8); those for training are shifted at random, by one pixel at most."""

    def __init__(self, training: bool):
        digits = load_digits()
        kept = (torch.arange(len(digits.target)) % 5 != 0) == training  # every fifth one is for validation
        self.images = torch.tensor(digits.images, dtype=torch.float32)[kept].unsqueeze(1) / 16
        self.labels, self.training = torch.tensor(digits.target)[kept], training

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.training:  # random numbers of workers are seeded for every batch, so that a rollback repeats them
            down, right = torch.randint(0, 3, (2,)).tolist()
            image = functional.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, 10),
    )


class Job:
    def __init__(self, context: JobContext):
        self.seed = context.seed

    def build_model(self):
        return network()

    def build_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def training_data(self):
        loader = DataLoader(Digits(training=True), batch_size=32, shuffle=True, num_workers=2, drop_last=True)
        return LoaderCursor(loader, seed=self.seed)

    def losses(self, model, batch: Batch):
        images, labels = batch.payload
        return {HOST: functional.cross_entropy(model(images), labels)}

    def validation_batches(self):
        return [Batch(payload, len(payload[1])) for payload in DataLoader(Digits(training=False), batch_size=120)]

    def evaluate(self, model, batch: Batch):
        images, labels = batch.payload
        logits = model(images)
        loss_sum = float(functional.cross_entropy(logits, labels, reduction="sum"))
        return Evaluation(loss_sum, int((logits.argmax(1) == labels).sum()), batch.samples)
