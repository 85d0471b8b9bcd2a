"""Small jobs as ordinary users write them.

Run one with `PYTHONPATH=tests tolaria serve --set training.job=support.user_jobs:NAME --set training.options.KEY=VALUE`.
"""

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tolaria.jobs import HOST, Batch, Evaluation, LoaderCursor, TensorCursor
from tolaria.jobs.digits import DigitsJob, DigitsOptions
from tolaria.seeds import SeedSlot


class Line:
    """Linear regression. Options: samples, batch, lr, width, step_s, nan_calls (list of loss calls that give NaN)."""

    def __init__(self, context):
        self.options, self.seed, self.calls = dict(context.options), context.seed, 0
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(int(self.options.get("samples", 64)), 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True)

    def build_model(self):
        width = int(self.options.get("width", 8))
        slot = SeedSlot("s", features=width, layout="vector")
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), slot, nn.Linear(width, 1))

    def build_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=float(self.options.get("lr", 0.01)))

    def training_data(self):
        return TensorCursor((self.x, self.y), batch_size=int(self.options.get("batch", 8)), seed=self.seed)

    def losses(self, model, batch):
        x, y = batch.payload
        time.sleep(float(self.options.get("step_s", 0.0)))
        self.calls += 1
        bad = self.calls in self.options.get("nan_calls", [])
        return {HOST: F.mse_loss(model(x), y) * (float("nan") if bad else 1.0)}

    def validation_batches(self):
        return [Batch((self.x, self.y), len(self.x))]

    def evaluate(self, model, batch):
        x, y = batch.payload
        prediction = model(x)
        close = int(((prediction - y).abs() < 0.5).sum())
        return Evaluation(float(F.mse_loss(prediction, y, reduction="sum")), close, batch.samples)


class Items(Dataset):
    """Options: samples, item_s (cost of one sample), bad_item (raises), noise (torch.rand augmentation)."""

    def __init__(self, options):
        self.options = options

    def __len__(self):
        return int(self.options.get("samples", 512))

    def __getitem__(self, index):
        if self.options.get("bad_item") == index:
            raise RuntimeError(f"corrupt sample {index}")
        time.sleep(float(self.options.get("item_s", 0.0)))
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        noise = torch.rand(4) * 0.1 if self.options.get("noise") else 0.0
        return x + noise, x.sum(0, keepdim=True)


class Loader(Line):
    """The README's kind of job: a shuffling DataLoader. More options: workers, persistent, Items' own."""

    def training_data(self):
        workers = int(self.options.get("workers", 0))
        loader = DataLoader(
            Items(self.options), batch_size=int(self.options.get("batch", 8)), shuffle=True, generator=torch.Generator(),
            num_workers=workers, persistent_workers=bool(self.options.get("persistent", False)) and workers > 0,
        )  # fmt: skip
        return LoaderCursor(loader, seed=self.seed)


class Table(Line):
    """`rows` x 1000 parameters with Adam, of which a step looks up two rows: a state of rows * 12 kB, quick steps."""

    def build_model(self):
        class Model(nn.Module):
            def __init__(self, rows):
                super().__init__()
                self.table, self.head = nn.Parameter(torch.zeros(rows, 1000)), nn.Linear(4, 1)

            def forward(self, x):
                return self.head(x) + self.table[:2].sum() * 0.001

        return Model(int(self.options.get("rows", 26000)))

    def build_optimizer(self, model):
        return torch.optim.Adam(model.parameters(), lr=1e-3)


class Digits:
    """Scikit-learn's digits, an MLP. Options: batch, lr, optimizer (sgd, adam), dropout, nan_sample, step_s."""

    def __init__(self, context):
        from sklearn.datasets import load_digits

        self.options, self.seed = dict(context.options), context.seed
        data = load_digits()
        order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
        x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
        self.train, self.held_out = (x[:1300].clone(), y[:1300]), (x[1300:], y[1300:])
        if (index := self.options.get("nan_sample")) is not None:
            self.train[0][index] = float("nan")

    def build_model(self):
        dropout = nn.Dropout(float(self.options.get("dropout", 0.0)))
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), dropout, nn.Linear(64, 10))

    def build_optimizer(self, model):
        rate = float(self.options.get("lr", 1e-3))
        if self.options.get("optimizer") == "sgd":
            return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        return torch.optim.Adam(model.parameters(), lr=rate)

    def training_data(self):
        return TensorCursor(self.train, batch_size=int(self.options.get("batch", 32)), seed=self.seed)

    def losses(self, model, batch):
        x, y = batch.payload
        time.sleep(float(self.options.get("step_s", 0.0)))
        return {HOST: F.cross_entropy(model(x), y)}

    def validation_batches(self):
        return [Batch(self.held_out, len(self.held_out[0]))]

    def evaluate(self, model, batch):
        x, y = batch.payload
        logits = model(x)
        right = int((logits.argmax(1) == y).sum())
        return Evaluation(float(F.cross_entropy(logits, y, reduction="sum")), right, len(y))


class Transposed(Line):
    """A weight stored transposed (not contiguous), and two losses."""

    def build_model(self):
        model = super().build_model()
        model[0].weight = nn.Parameter(model[0].weight.detach().t().contiguous().t())
        return model

    def build_optimizer(self, model):
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def losses(self, model, batch):
        x, y = batch.payload
        prediction = model(x)
        return {HOST: F.mse_loss(prediction, y), "aux": F.l1_loss(prediction, y)}


class Unfreezing(Line):
    """The first layer joins the training after 16 batches."""

    def build_model(self):
        model = super().build_model()
        model[0].requires_grad_(False)
        return model

    def losses(self, model, batch):
        if self.calls == 16:
            model[0].requires_grad_(True)
        return super().losses(model, batch)


class ScaledAdam(torch.optim.Adam):
    """An optimizer with an argument of its own."""

    def __init__(self, params, lr=1e-3, scale=1.0):
        super().__init__(params, lr=lr)
        self.scale = scale

    def step(self, closure=None):
        for group in self.param_groups:
            torch._foreach_mul_([p.grad for p in group["params"] if p.grad is not None], self.scale)
        return super().step(closure)


class OwnOptimizer(Line):
    """`scale` must still be 0.01 after fusing, after a rebuild and after a resume."""

    def build_optimizer(self, model):
        return ScaledAdam(model.parameters(), scale=0.01)


class OwnScheduler(Line):
    """Steps a scheduler of torch's on the optimizer that it built: obeyed or refused, said either way."""

    def build_optimizer(self, model):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
        return optimizer

    def losses(self, model, batch):
        if self.calls:
            self.scheduler.step()
        return super().losses(model, batch)


class TensorEvaluation(Line):
    """Puts tensors where numbers belong, as many would."""

    def evaluate(self, model, batch):
        x, y = batch.payload
        return Evaluation(F.mse_loss(model(x), y, reduction="sum"), 0, batch.samples)


class SlowEvaluation(Line):
    """One evaluation batch takes `eval_s` seconds."""

    def evaluate(self, model, batch):
        if self.calls > 20:
            time.sleep(float(self.options.get("eval_s", 45)))
        return super().evaluate(model, batch)


class FrozenNorm(DigitsJob):
    """Keeps BatchNorm in eval mode by overriding `train` on the layer; Tolaria must not undo it."""

    def build_model(self):
        model = super().build_model()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return model


class Average(Line):
    """Keeps a moving average of the weights itself, in `state_dict`: it must survive rollback and crash."""

    def build_model(self):
        model = super().build_model()
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        return model

    def losses(self, model, batch):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(p, 0.01)
        return super().losses(model, batch)

    def state_dict(self):
        return {"average": self.average, "calls": self.calls}

    def load_state_dict(self, state):
        self.average, self.calls = dict(state["average"]), state["calls"]


def compiled(context):
    """A job that compiles its own model; seeds are grafted all the same."""

    class Job(DigitsJob):
        def build_model(self):
            return torch.compile(super().build_model(), backend="eager")

    return Job(context, DigitsOptions(learning_rate=3e-3))


def channels_last(context):
    """A host in channels_last; a grafted seed's backward must not crash the process."""

    class Job(DigitsJob):
        def build_model(self):
            return super().build_model().to(memory_format=torch.channels_last)

    return Job(context, DigitsOptions(learning_rate=3e-3))
