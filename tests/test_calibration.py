"""Dividing w out of re-weighted logits gives the annotators' distribution back; a temperature fits what is left."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax

from sailer.training.calibration import TEMPERATURE_RANGE, fit_temperature, natural_probabilities
from sailer.training.losses import DistributionLoss, label_prior, label_weights
from sailer.training.metrics import distribution_metrics


@pytest.fixture
def skewed():
    """Distributions (500, 4) of which the first class has most, their prior and w."""
    distributions = np.random.default_rng(0).dirichlet([6.0, 2.0, 1.0, 0.5], size=500)
    prior = label_prior(distributions)
    return distributions, label_weights(prior).numpy()


def test_natural_probabilities_by_hand():
    # softmax(log 4, log 1, log 1) with w = (2, 1, 0): (4/2, 1/1, none) = (2/3, 1/3, 0); temperature 2: square roots
    logits = torch.tensor([[math.log(4), 0.0, 0.0]])
    torch.testing.assert_close(natural_probabilities(logits, [2.0, 1.0, 0.0]), torch.tensor([[2 / 3, 1 / 3, 0.0]]))
    root = math.sqrt(2)
    softened = natural_probabilities(logits, [2.0, 1.0, 0.0], temperature=2.0)
    torch.testing.assert_close(softened, torch.tensor([[root / (root + 1), 1 / (root + 1), 0.0]]))
    array = natural_probabilities(logits.numpy(), np.array([2.0, 1.0, 0.0]), temperature=2.0)
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    np.testing.assert_allclose(array, softened.numpy())
    torch.testing.assert_close(natural_probabilities(logits), torch.tensor([[4 / 6, 1 / 6, 1 / 6]]))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (5, 2, 3)])
def test_natural_probabilities_of_any_number_of_axes(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = [natural_probabilities(row[None], [2.0, 1.0, 0.5], 0.7)[0] for row in logits.reshape(-1, 3)]
    expected = torch.stack(rows).reshape(shape)
    torch.testing.assert_close(natural_probabilities(logits, [2.0, 1.0, 0.5], 0.7), expected)


@pytest.mark.parametrize("weighting", ["product", "normalized"])
def test_dividing_w_out_recovers_the_distributions(skewed, weighting):
    distributions, weights = skewed
    targets = torch.from_numpy(distributions[:20])
    logits = torch.zeros_like(targets, requires_grad=True)
    loss = DistributionLoss("kl", weighting, weights)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        value = loss(logits, targets)
        value.backward()
        return value

    optimizer.step(step)
    balanced = distributions[:20] * weights / (distributions[:20] * weights).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(logits.detach().softmax(-1).numpy(), balanced, atol=1e-4)
    np.testing.assert_allclose(natural_probabilities(logits.detach(), weights).numpy(), distributions[:20], atol=1e-4)


def test_temperature_and_w_bring_the_calibration_error_down(skewed):
    distributions, weights = skewed
    logits = 3.0 * np.log(distributions) + np.log(weights)  # re-weighted, and overconfident three times
    temperature = fit_temperature(logits, distributions, weights)
    assert temperature == pytest.approx(3.0, rel=1e-3)
    natural = natural_probabilities(logits, weights, temperature)
    np.testing.assert_allclose(natural, distributions, atol=1e-3)
    balanced = distribution_metrics(softmax(logits, axis=1), distributions)
    calibrated = distribution_metrics(natural, distributions)
    assert balanced["ece"] > 0.1 > 0.01 > calibrated["ece"]
    assert balanced["kl"] > 0.1 > 0.01 > calibrated["kl"]


def test_temperature_is_the_minimum_on_noisy_votes(skewed, caplog):
    distributions, weights = skewed
    random = np.random.default_rng(1)
    votes = np.stack([random.multinomial(5, row) for row in distributions]) / 5
    logits = 0.5 * np.log(distributions) + np.log(weights)

    def cross_entropy(temperature):
        return -(votes * np.log(natural_probabilities(logits, weights, temperature))).sum(axis=1).mean()

    found = fit_temperature(logits, votes, weights)
    assert 0.3 < found < 0.8 and not caplog.text
    assert cross_entropy(found) <= min(cross_entropy(found * 0.98), cross_entropy(found * 1.02))


def test_unknown_rows_and_votes_for_absent_classes_are_left_out():
    distributions = np.array([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.4, 0.6, 0.0]])
    logits = np.log(np.array([[0.7, 0.3, 1.0], [0.2, 0.8, 1.0], [0.4, 0.6, 1.0]])) * 2
    weights = [1.0, 1.0, 0.0]
    expected = fit_temperature(logits, distributions, weights)
    distributions[1] *= 0.5
    distributions[1, 2] = 0.5  # half of the annotators chose the class that training never had
    more = np.vstack([distributions, [np.nan] * 3, [0.0, 0.0, 1.0]])
    logits = np.vstack([logits, [9.0, -9.0, 0.0], [9.0, -9.0, 0.0]])
    assert fit_temperature(torch.from_numpy(logits), torch.from_numpy(more), weights) == pytest.approx(expected)


def test_temperature_at_the_end_of_its_range_is_said(caplog):
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, 1 - np.eye(2)) == pytest.approx(TEMPERATURE_RANGE[1], rel=1e-2)
    assert "at the end of" in caplog.text
    assert TEMPERATURE_RANGE == (0.05, 20)


def test_what_cannot_be():
    logits = np.zeros((2, 3))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            natural_probabilities(logits, None, temperature)
    for weights in ([1.0, 1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="label_weights must be 3 numbers"):
            natural_probabilities(logits, weights)
    with pytest.raises(ValueError, match="No clip of the validation set has"):
        fit_temperature(logits, np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match=r"Expected two arrays \(clips, labels\)"):
        fit_temperature(logits, np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"Expected two arrays \(clips, labels\)"):
        fit_temperature(np.zeros((3, 3)), logits)
