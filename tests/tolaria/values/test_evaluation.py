from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolaria.values.evaluation import Evaluation, Ratio, metric_name_problem


def test_figures_are_loss_accuracy_and_metrics() -> None:
    """Accuracy is there if it is counted; a metric of any kind is its value."""
    metrics: dict[str, float | Ratio] = {
        "mae": 0.5,
        "perplexity": Ratio(20.0, 10.0, exponential=True),
        "f1": Ratio(6.0, 8.0),
    }
    assert Evaluation(8.0, 3, 4, metrics).figures() == {
        "loss": 2.0, "accuracy": 0.75, "mae": 0.5, "perplexity": math.exp(2.0), "f1": 0.75,
    }  # fmt: skip
    assert Evaluation(8.0, samples=4).figures() == {"loss": 2.0}
    assert math.isnan(Evaluation(8.0, samples=4).accuracy)
    assert Evaluation(0.0, 0, 0).accuracy == 0.0
    assert math.isnan(Evaluation(0.0).accuracy)
    assert Evaluation(0.0).figures() == {}


def test_a_plain_number_is_averaged_by_samples() -> None:
    """Batches of 10 and 30 samples."""
    total = Evaluation(0.0) + Evaluation(1.0, None, 10, {"mae": 1.0}) + Evaluation(1.0, None, 30, {"mae": 3.0})
    assert total.figures()["mae"] == pytest.approx(2.5)


def test_a_ratio_is_averaged_as_it_says() -> None:
    """The F1 of all samples is not the mean of the F1 of batches, nor is perplexity."""
    total = Evaluation(0.0) + Evaluation(1.0, 1, 10, {"f1": Ratio(2, 2), "ppl": Ratio(1.0, 1.0, exponential=True)})
    total += Evaluation(1.0, 1, 10, {"f1": Ratio(2, 8), "ppl": Ratio(9.0, 3.0, exponential=True)})
    assert total.figures()["f1"] == 0.4
    assert total.figures()["ppl"] == pytest.approx(math.exp(2.5))
    assert (total.correct, total.samples) == (2, 20)


def test_a_metric_without_weight_is_not_a_number() -> None:
    """And one that is too large for a float is infinite."""
    assert math.isnan(Ratio(0.0, 0.0).value)
    assert Ratio(1e6, 1.0, exponential=True).value == math.inf


numbers = st.integers(-1000, 1000).map(float)
evaluations = st.builds(
    Evaluation,
    numbers,
    st.none() | st.integers(0, 9),
    st.integers(1, 9),
    st.dictionaries(st.sampled_from("abc"), st.builds(Ratio, numbers, st.integers(1, 9).map(float)), max_size=3),
)


@given(evaluations, evaluations, evaluations)
def test_the_order_of_batches_does_not_matter(one: Evaluation, two: Evaluation, three: Evaluation) -> None:
    """Addition is associative and commutative, and the empty evaluation changes nothing."""
    assert (one + two) + three == one + (two + three)
    assert one + two == two + one
    assert Evaluation(0.0) + one == one


@pytest.mark.parametrize("name", ["", "a b", "1st", "x" * 65, "é", 3, "loss", "accuracy"])
def test_names_that_cannot_be_shown(name: object) -> None:
    """Not names of a label, or those of other figures."""
    assert metric_name_problem(name)


def test_names_that_can_be_shown() -> None:
    """As users write them."""
    assert not any(map(metric_name_problem, ("f1", "val/ppl", "loss.task-1", "top_5")))
