"""Small tasks for the trial of guards: models, data, losses and validation, each trained in a few hundred quick steps.

A task is built from options. Its data come from scikit-learn or from a generator with a fixed seed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from tolaria.jobs import HOST

Options = Mapping[str, Any]


class Task:
    """A model, data and a loss.

    Attributes:
        train: tensors with samples first; the first one holds what a corrupted sample corrupts, in floats.
        held_out: the same for validation.
        labels: class of each training sample, for tasks whose data can be sorted; None for others.
        has_accuracy: whether validation counts right answers; its loss is the metric if not.
    """

    has_accuracy: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        self.options = options
        self.train: tuple[Tensor, ...] = ()
        self.held_out: tuple[Tensor, ...] = ()
        self.labels: Tensor | None = None

    def model(self) -> nn.Module:
        """Returns a new model."""
        raise NotImplementedError

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Returns the mean loss of a batch by source."""
        raise NotImplementedError

    def validate(self, model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[float, int]:
        """Returns the mean loss over the samples, and how many answers are right."""
        losses = self.losses(model, parts)
        return float(sum(losses.values())) / len(losses), 0

    def noise(self, parts: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Returns a batch of the same shapes as a damaged file would hold it."""
        raise NotImplementedError


class Digits(Task):
    """Scikit-learn's digits, an MLP. Options: width, dropout, label_noise (share of wrong labels), norm (BatchNorm)."""

    has_accuracy = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        data = load_digits()
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(data.data), generator=generator)
        x = torch.tensor(data.data / 16, dtype=torch.float32)[order]
        y = torch.tensor(data.target)[order]
        self.held_out = x[1300:], y[1300:]
        x, y = x[:1300].clone(), y[:1300].clone()
        wrong = torch.rand(len(y), generator=generator) < float(options.get("label_noise", 0.0))
        y[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
        self.train, self.labels = (x, y), y

    def model(self) -> nn.Module:
        width = int(self.options.get("width", 64))
        norm = nn.BatchNorm1d(width) if self.options.get("norm") else nn.Identity()
        dropout = nn.Dropout(float(self.options.get("dropout", 0.0)))
        return nn.Sequential(nn.Linear(64, width), norm, nn.ReLU(), dropout, nn.Linear(width, 10))

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y = parts
        return {HOST: functional.cross_entropy(model(x), y)}

    def validate(self, model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[float, int]:
        x, y = parts
        logits = model(x)
        return float(functional.cross_entropy(logits, y)), int((logits.argmax(1) == y).sum())

    def noise(self, parts: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        x, y = parts
        return torch.rand(x.shape, generator=generator) * 4, torch.randint(0, 10, y.shape, generator=generator)


class Bandit(Digits):
    """The digits as a contextual bandit: the policy gradient's loss changes sign and is near zero."""

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y = parts
        choices = torch.distributions.Categorical(logits=model(x))
        action = choices.sample()  # type: ignore[no-untyped-call] # torch leaves it untyped
        reward = (action == y).float()
        return {HOST: -((reward - reward.mean()) * choices.log_prob(action)).mean()}  # type: ignore[no-untyped-call]


class Autoencoder(Digits):
    """A tiny variational autoencoder of the digits (Kingma and Welling 2014); the metric is its loss per sample."""

    has_accuracy = False

    def model(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "encode": nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)),
                "decode": nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64)),
            }
        )

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, parts_of = parts[0], cast("nn.ModuleDict", model)
        mean, log_variance = parts_of["encode"](x).chunk(2, 1)
        noise = torch.randn_like(mean) if model.training else torch.zeros_like(mean)
        decoded = parts_of["decode"](mean + noise * (0.5 * log_variance).exp())
        likelihood = functional.binary_cross_entropy_with_logits(decoded, x, reduction="none").sum(1)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return {HOST: (likelihood + divergence).mean()}

    def validate(self, model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[float, int]:
        return float(self.losses(model, parts)[HOST]), 0


class Line(Task):
    """Linear regression without noise: the loss falls towards zero. Options: width."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        x = torch.randn(1500, 8, generator=torch.Generator().manual_seed(7))
        y = x.sum(1, keepdim=True)
        self.train, self.held_out = (x[:1000].clone(), y[:1000]), (x[1000:], y[1000:])

    def model(self) -> nn.Module:
        return nn.Linear(8, 1)

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y = parts
        return {HOST: functional.mse_loss(model(x), y)}


class Hinge(Line):
    """Two classes that can be separated, with a hinge loss: it becomes exactly zero."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        kept = self.train[1].abs()[:, 0] > 0.5
        self.train = self.train[0][kept], self.train[1][kept].sign()
        self.held_out = self.held_out[0], self.held_out[1].sign()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y = parts
        return {HOST: functional.relu(1 - y * model(x)).mean()}


class Density(Line):
    """The density of a narrow curve under a mixture of eight Gaussians (Bishop 1994): the loss becomes negative."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        generator = torch.Generator().manual_seed(3)
        x = torch.rand(1500, 1, generator=generator) * 6 - 3
        y = x.sin() + 0.03 * torch.randn(1500, 1, generator=generator)
        self.train, self.held_out = (x[:1000].clone(), y[:1000]), (x[1000:], y[1000:])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 24))

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y = parts
        weights, means, scales = model(x).chunk(3, 1)
        scales = functional.softplus(scales) + 1e-2
        by_part = torch.distributions.Normal(means, scales).log_prob(y) + weights.log_softmax(1)  # type: ignore[no-untyped-call]
        return {HOST: -by_part.logsumexp(1).mean()}


class Conflict(Line):
    """Four tasks that conflict on purpose: one output that each of them pulls to another function of the input."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, y = parts
        found = model(x)
        targets = {HOST: y, "minus": -y, "square": x[:, :1] ** 2 * 3, "wave": 3 * (2 * x[:, 1:2]).sin()}
        return {name: functional.mse_loss(found, target) for name, target in targets.items()}


class Adversaries(Digits):
    """A generator of digits and a critic that train against each other (Goodfellow et al. 2014), with one optimizer.

    What one wins the other loses: the sum of their losses may rise for as long as training lasts.
    """

    has_accuracy = False

    def model(self) -> nn.Module:
        return nn.ModuleDict(
            {
                "make": nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid()),
                "judge": nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)),
            }
        )

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, parts_of = parts[0], cast("nn.ModuleDict", model)
        made = parts_of["make"](torch.randn(len(x), 16))
        judge = parts_of["judge"]
        judged = functional.softplus(-judge(x)).mean() + functional.softplus(judge(made.detach())).mean()
        fixed = {name: parameter.detach() for name, parameter in judge.named_parameters()}
        fooled = functional.softplus(-torch.func.functional_call(judge, fixed, (made,))).mean()
        return {HOST: judged + fooled}

    def validate(self, model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[float, int]:
        """Returns how far the mean of what is made is from that of the digits; the losses say nothing."""
        x, parts_of = parts[0], cast("nn.ModuleDict", model)
        made = parts_of["make"](torch.randn(len(x), 16, generator=torch.Generator().manual_seed(1)))
        return float((made.mean(0) - x.mean(0)).abs().mean()), 0


class Student(Digits):
    """A student that predicts a slow average of itself (Grill et al. 2020): the loss falls at once, and rises later."""

    has_accuracy = False

    def model(self) -> nn.Module:
        sizes = (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
        predict = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        model = nn.ModuleDict({"student": nn.Sequential(*sizes), "teacher": nn.Sequential(*sizes), "predict": predict})
        model["teacher"] = copy.deepcopy(model["student"]).requires_grad_(requires_grad=False)
        return model

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, parts_of = parts[0], cast("nn.ModuleDict", model)
        noise = 0.1 * torch.randn(2, *x.shape) if model.training else torch.zeros(2, *x.shape)
        one, other = x + noise[0], x + noise[1]
        with torch.no_grad():
            aim = parts_of["teacher"](other)
            if model.training:
                for mean, new in zip(parts_of["teacher"].parameters(), parts_of["student"].parameters(), strict=True):
                    mean.lerp_(new, 0.01)
        found = parts_of["predict"](parts_of["student"](one))
        return {HOST: (2 - 2 * functional.cosine_similarity(found, aim)).mean()}

    def validate(self, model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[float, int]:
        return float(self.losses(model, parts)[HOST]), 0


class Values(Line):
    """Temporal differences with a target that is renewed from time to time (Mnih et al. 2015).

    The values grow from zero to the sum of the rewards to come, and the loss grows with them for a long time.
    """

    def model(self) -> nn.Module:
        value = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        model = nn.ModuleDict({"value": value, "target": copy.deepcopy(value).requires_grad_(requires_grad=False)})
        model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        return model

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, parts_of = parts[0], cast("nn.ModuleDict", model)
        reward = functional.relu(x[:, :1])
        following = x.roll(1, 1) * 0.9 + 0.1
        with torch.no_grad():
            if model.training:
                passes = cast("Tensor", model.passes)
                passes += 1
                if int(passes) % int(self.options.get("renewed_every", 50)) == 0:
                    parts_of["target"].load_state_dict(parts_of["value"].state_dict())
            aim = reward + 0.98 * parts_of["target"](following)
        return {HOST: functional.mse_loss(parts_of["value"](x), aim)}

    def validate(self, model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[float, int]:
        return float(self.losses(model, parts)[HOST]), 0


CONTEXT, LETTERS = 32, " .abcdefghijklmnopqrstuvwxyz"
_TENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", *_TENS)


def _sums(sentences: int) -> Tensor:
    """Returns the characters of sentences such as "five plus four is nine." as numbers."""
    first, second = torch.randint(0, 10, (2, sentences), generator=torch.Generator().manual_seed(5)).tolist()
    said = [f"{_WORDS[a]} plus {_WORDS[b]} is {_WORDS[a + b]}." for a, b in zip(first, second, strict=True)]
    return torch.tensor([LETTERS.index(letter) for letter in " ".join(said)])


class _Block(nn.Module):
    """A transformer's block, with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = self.qkv(self.before(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + cast("Tensor", self.mlp(self.between(x)))


class _Transformer(nn.Module):
    """A decoder of characters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(_Block(width, 2), _Block(width, 2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(LETTERS)))

    def forward(self, letters: Tensor) -> Tensor:
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        return cast("Tensor", self.head(self.blocks(x)))


class Characters(Task):
    """A character GPT on sums in words. Samples carry a weight of their loss, as mixtures of corpora have."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        rows = _sums(1800)[: 1280 * (CONTEXT + 1)].view(1280, CONTEXT + 1)
        weights = torch.ones(1280)
        self.train, self.held_out = (weights[:1024].clone(), rows[:1024]), (weights[1024:], rows[1024:])

    def model(self) -> nn.Module:
        return _Transformer(int(self.options.get("width", 32)))

    def losses(self, model: nn.Module, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        weights, rows = parts
        by_place = functional.cross_entropy(model(rows[:, :-1]).transpose(1, 2), rows[:, 1:], reduction="none")
        return {HOST: (by_place.mean(1) * weights).mean()}

    def noise(self, parts: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        weights, rows = parts
        return weights, torch.randint(0, len(LETTERS), rows.shape, generator=generator)


TASKS: Mapping[str, type[Task]] = {
    "digits": Digits,
    "adversaries": Adversaries,
    "bandit": Bandit,
    "vae": Autoencoder,
    "line": Line,
    "hinge": Hinge,
    "density": Density,
    "conflict": Conflict,
    "student": Student,
    "values": Values,
    "gpt": Characters,
}
