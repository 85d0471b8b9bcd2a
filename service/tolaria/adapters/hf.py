"""`HuggingFaceJob`: a job made of a model of transformers, data sets like those of `datasets`, and a collator."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tolaria.adapters.loaders import LoaderBatches
from tolaria.errors import BrokenJobError
from tolaria.jobs import HOST, Batch, Evaluation, JobContext, LoaderCursor, Ratio

try:
    from transformers import default_data_collator
except ImportError as missing:
    raise ImportError(f"tolaria.adapters.hf needs tolaria[hf]: pip install 'tolaria[hf]' ({missing})") from missing

TRAINING: Final = "train"
VALIDATION: Final = ("validation", "valid", "eval", "test")
"""Names of splits; of those for validation the first that there is."""

_IGNORED_LABEL: Final = -100
_LABELS: Final = ("labels", "label", "label_ids")

Collator = Callable[[list[Any]], Mapping[str, Any]]
Metrics = Callable[[Any, Mapping[str, Tensor]], Mapping[str, float | Ratio]]


class HuggingFaceJob:
    """Trains a model that computes its own loss, as all models of transformers with a head do if they get labels.

    Args:
        context: the argument of the job's factory.
        model: returns the model, for example `lambda: AutoModelForCausalLM.from_pretrained("gpt2")`.
        data: data sets by split, such as a `DatasetDict`: rows are mappings. `train` is needed; the first of
            `validation`, `valid`, `eval` and `test` is evaluated on.
        collator: makes a batch of rows, as the data collators of transformers do. None: `default_data_collator`.
        batch_size: rows in a batch.
        optimizer: returns the optimizer of a model. None: AdamW with `learning_rate` and `weight_decay`, without decay
            of biases and norms, as in the library's own Trainer.
        workers: worker processes that read data.
        metrics: returns further metrics of the model's output and a batch, for evaluations.

    Columns that the model's `forward` does not take are left out, as by the library's Trainer. Models whose labels are
    tokens are evaluated by perplexity, those whose labels are classes by accuracy.

    Raises:
        BrokenJobError: there is no data to train on, or it has no rows.
    """

    def __init__(
        self,
        context: JobContext,
        *,
        model: Callable[[], nn.Module],
        data: Mapping[str, Any],
        collator: Collator | None = None,
        batch_size: int = 8,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        **options: Any,
    ) -> None:
        self._context = context
        self._model = model
        self._data = _checked(data)
        self._collator = cast("Collator", default_data_collator) if collator is None else collator
        self._batch_size = batch_size
        self._optimizer = optimizer
        self._learning_rate, self._weight_decay, self._workers, self._metrics = _options(**options)
        self._columns: frozenset[str] | None = None

    def build_model(self) -> nn.Module:
        """Returns the model."""
        model = self._model()
        parameters = inspect.signature(model.forward).parameters.values()
        named = {each.name for each in parameters if each.kind not in {each.VAR_KEYWORD, each.VAR_POSITIONAL}}
        if named:
            self._columns = frozenset({*named, *_LABELS})
        return model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns the optimizer over the parameters that are trained."""
        if self._optimizer is not None:
            return self._optimizer(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decayed = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self._weight_decay}
        plain = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
        groups = [group for group in (decayed, plain) if group["params"]]
        return torch.optim.AdamW(groups, lr=self._learning_rate)

    def training_data(self) -> LoaderCursor:
        """Returns shuffled batches of the training data."""
        return LoaderCursor(self._loader(self._data[TRAINING], shuffle=True), seed=self._context.seed)

    def losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Returns the loss that the model computes."""
        return {HOST: _loss_of(model(**batch.payload))}

    def validation_batches(self) -> Iterable[Batch]:
        """Returns the batches of the validation data; none without such data."""
        split = next((name for name in VALIDATION if name in self._data), None)
        if split is None:
            return []
        return LoaderBatches(self._loader(self._data[split], shuffle=False), lambda given, _place: given)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluation:
        """Evaluates a batch: the model's loss, accuracy or perplexity, and the metrics that were asked for."""
        output = model(**batch.payload)
        loss = float(_loss_of(output))
        labels, logits = batch.payload.get("labels"), getattr(output, "logits", None)
        metrics: dict[str, float | Ratio] = {}
        correct = None
        if isinstance(labels, Tensor) and not labels.is_floating_point() and isinstance(logits, Tensor):
            if labels.ndim == 1 and logits.ndim == 2:
                correct = int((logits.argmax(-1) == labels).sum())
            elif labels.ndim == 2 and logits.ndim == 3:
                tokens = int((labels != _IGNORED_LABEL).sum())
                metrics["perplexity"] = Ratio(loss * tokens, tokens, exponential=True)
        if self._metrics is not None:
            metrics |= self._metrics(output, batch.payload)
        return Evaluation(loss * batch.samples, correct, batch.samples, metrics)

    def _loader(self, data: Any, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            cast("Dataset[Any]", data),
            batch_size=self._batch_size,
            shuffle=shuffle,
            num_workers=self._workers,
            collate_fn=_Collate(self._collator, self._columns),
        )


class _Collate:
    """Collates rows without the columns that a model does not take (None: it takes all). Passed to workers."""

    def __init__(self, collator: Collator, columns: frozenset[str] | None) -> None:
        self._collator = collator
        self._columns = columns

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        wanted = self._columns
        if wanted is not None and rows and isinstance(rows[0], Mapping):
            rows = [{name: value for name, value in row.items() if name in wanted} for row in rows]
            if not rows[0]:
                raise BrokenJobError(f"no column of the data is one that the model takes: {', '.join(sorted(wanted))}")
        return dict(self._collator(rows))


def _checked(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or TRAINING not in data:
        found = f"has {', '.join(map(str, data)) or 'none'}" if isinstance(data, Mapping) else type(data).__name__
        raise BrokenJobError(f"data must be a mapping of splits with {TRAINING!r}, as a DatasetDict is; it {found}")
    if hasattr(data[TRAINING], "__len__") and not len(data[TRAINING]):
        raise BrokenJobError(f"data[{TRAINING!r}] has no rows")
    return cast("Mapping[str, Any]", data)


def _options(
    *, learning_rate: float = 5e-5, weight_decay: float = 0.0, workers: int = 0, metrics: Metrics | None = None
) -> tuple[float, float, int, Metrics | None]:
    """Returns the further options of a job, with the defaults of the library's Trainer."""
    return learning_rate, weight_decay, workers, metrics


def _loss_of(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise BrokenJobError(
            f"the model returned no loss (a {type(output).__name__}): its batches need labels, "
            "which a collator such as DataCollatorForLanguageModeling(tokenizer, mlm=False) adds"
        )
    return loss if loss.ndim == 0 else loss.mean()
