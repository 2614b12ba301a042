"""Losses against values worked out by hand, gradients against finite differences, and targets that are unknown."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers.utils import ModelOutput

from sailer.training.losses import (
    ClassLoss,
    ConcordanceLoss,
    DistributionLoss,
    ObjectiveSettings,
    SailerObjective,
    SquaredErrorLoss,
    adjust_logits,
    label_prior,
    label_weights,
    log_prior,
)

LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)
UNKNOWN = math.nan

# softmax of these logits is (1/2, 1/4, 1/4) and (1/3, 1/3, 1/3)
LOGITS = torch.tensor([[LOG2, 0.0, 0.0], [0.0, 0.0, 0.0]])
DISTRIBUTIONS = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
WEIGHTS = [0.5, 2.0, 4.0]
# d * w = (1/4, 1, 0), which sums to 5/4, and (0, 0, 4)


def test_kl_by_hand():
    first = 0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    second = math.log(1 / (1 / 3))
    assert DistributionLoss("kl")(LOGITS, DISTRIBUTIONS).item() == pytest.approx((first + second) / 2)


def test_a_row_that_is_partly_nan_adds_nothing():
    partly = torch.tensor([[0.5, 0.5, 0.0], [UNKNOWN, 0.5, 0.5]])
    assert DistributionLoss("kl")(LOGITS, partly).item() == pytest.approx(0.5 * LOG2 / 2)


def test_soft_cross_entropy_by_hand():
    first = 0.5 * LOG2 + 0.5 * LOG4
    for objective in ("soft_ce", "ce"):
        assert DistributionLoss(objective)(LOGITS, DISTRIBUTIONS).item() == pytest.approx((first + LOG3) / 2)


def test_focal_by_hand():
    first = 0.5 * 0.5**2 * LOG2 + 0.5 * 0.75**2 * LOG4
    second = (2 / 3) ** 2 * LOG3
    loss = DistributionLoss("focal", focal_gamma=2.0)
    assert loss(LOGITS, DISTRIBUTIONS).item() == pytest.approx((first + second) / 2)


def test_focal_carries_the_class_weights():
    first = 0.25 * 0.5**2 * LOG2 + 1.0 * 0.75**2 * LOG4
    second = 4 * (2 / 3) ** 2 * LOG3
    loss = DistributionLoss("focal", "product", WEIGHTS, focal_gamma=2.0)
    assert loss(LOGITS, DISTRIBUTIONS).item() == pytest.approx((first + second) / 2)


def test_focal_of_gamma_0_is_cross_entropy():
    focal, cross_entropy = DistributionLoss("focal", focal_gamma=0.0), DistributionLoss("soft_ce")
    assert torch.equal(focal(LOGITS, DISTRIBUTIONS), cross_entropy(LOGITS, DISTRIBUTIONS))


def test_product_target_by_hand_is_not_renormalised():
    first = 0.25 * math.log(0.25 / 0.5) + 1.0 * math.log(1.0 / 0.25)
    second = 4 * math.log(4 / (1 / 3))
    loss = DistributionLoss("kl", "product", WEIGHTS)
    assert loss(LOGITS, DISTRIBUTIONS).item() == pytest.approx((first + second) / 2)


def test_product_loss_may_be_negative():
    # t = 0.1 on the first class: 0.1 * (log 0.1 - log 0.5)
    loss = DistributionLoss("kl", "product", [0.1, 1.0, 1.0])(LOGITS[:1], torch.tensor([[1.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(0.1 * math.log(0.1 / 0.5)) and loss.item() < 0


def test_normalized_target_by_hand():
    first = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.25)
    loss = DistributionLoss("kl", "normalized", WEIGHTS)
    assert loss(LOGITS, DISTRIBUTIONS).item() == pytest.approx((first + LOG3) / 2)


def test_normalized_target_without_any_weight_adds_nothing():
    logits = LOGITS.clone().requires_grad_()
    loss = DistributionLoss("kl", "normalized", [1.0, 1.0, 0.0])(logits, DISTRIBUTIONS)
    assert loss.item() == pytest.approx(LOG2 / 2 / 2)  # the first clip's KL, 0.5 log 2, over two rows
    loss.backward()
    assert torch.equal(logits.grad[1], torch.zeros(3))


def test_evaluation_neither_reweights_nor_adjusts():
    plain = DistributionLoss("kl")(LOGITS, DISTRIBUTIONS)
    prior = [0.5, 0.25, 0.25]
    loss = DistributionLoss("kl", "product", WEIGHTS, logit_adjustment=1.0, label_prior=prior)
    assert not torch.equal(loss(LOGITS, DISTRIBUTIONS), plain)
    assert torch.equal(loss.eval()(LOGITS, DISTRIBUTIONS), plain)


@pytest.mark.parametrize("weighting", ["none", "product", "normalized"])
def test_kl_and_soft_cross_entropy_have_equal_gradients(weighting):
    gradients = []
    for objective in ("kl", "soft_ce"):
        logits = LOGITS.double().requires_grad_()
        DistributionLoss(objective, weighting, WEIGHTS)(logits, DISTRIBUTIONS.double()).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-15)


def test_gradient_by_hand():
    # d loss / d logits = (sum(t) * p - t) / rows, with t = (1/4, 1, 0)
    logits = LOGITS[:1].clone().requires_grad_()
    DistributionLoss("kl", "product", WEIGHTS)(logits, DISTRIBUTIONS[:1]).backward()
    torch.testing.assert_close(logits.grad[0], torch.tensor([1.25 / 2 - 0.25, 1.25 / 4 - 1, 1.25 / 4]))


def test_logit_adjustment_in_training_by_hand():
    # tau = 2: logits + 2 log prior, so the softmax of (1, 1, 1) * prior ** 2 = (4, 1, 1) / 16 is (2/3, 1/6, 1/6)
    loss = DistributionLoss("soft_ce", logit_adjustment=2.0, label_prior=[0.5, 0.25, 0.25])
    assert loss(LOGITS[1:], DISTRIBUTIONS[1:]).item() == pytest.approx(math.log(6))


def test_logit_adjustment_takes_a_class_of_prior_0_as_the_rarest():
    assert log_prior([0.75, 0.25, 0.0]).tolist() == pytest.approx([math.log(0.75), -LOG4, -LOG4])
    loss = DistributionLoss("soft_ce", logit_adjustment=1.0, label_prior=[0.75, 0.25, 0.0])
    # softmax(log(3/4), log(1/4), log(1/4)) = (3, 1, 1) / 5
    assert loss(LOGITS[1:], torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(math.log(5 / 3))


def test_adjust_logits_at_inference():
    prior = [0.5, 0.5, 0.0]
    adjusted = adjust_logits(LOGITS, prior, tau=2.0)
    torch.testing.assert_close(adjusted, LOGITS + 2 * LOG2)
    array = adjust_logits(LOGITS.numpy(), prior, tau=2.0)
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    np.testing.assert_allclose(array, adjusted.numpy())
    torch.testing.assert_close(adjust_logits(LOGITS, prior), LOGITS + LOG2)


def test_squared_error_by_hand():
    targets = torch.tensor([[0.5, UNKNOWN, 0.0], [UNKNOWN, UNKNOWN, 1.0]])
    predictions = torch.full((2, 3), 0.25)
    expected = (0.25**2 + 0.25**2 + 0.75**2) / 6
    assert SquaredErrorLoss()(predictions, targets).item() == pytest.approx(expected)
    age = SquaredErrorLoss(100.0)(torch.tensor([30.0, 50.0]), torch.tensor([40.0, UNKNOWN]))
    assert age.item() == pytest.approx(0.1**2 / 2)


def test_concordance_by_hand():
    # known targets 0, 1/2, 1 (mean 1/2, variance 1/6); predictions 0, 1/4, 1/2 (mean 1/4, variance 1/24);
    # covariance 1/12; CCC = (1/6) / (1/6 + 1/24 + 1/16) = 8/13
    targets = torch.tensor([[0.0], [0.5], [UNKNOWN], [1.0]])
    predictions = torch.tensor([[0.0], [0.25], [0.9], [0.5]])
    assert ConcordanceLoss()(predictions, targets).item() == pytest.approx(1 - 8 / 13)
    assert ConcordanceLoss()(targets.nan_to_num(), targets).item() == pytest.approx(0, abs=1e-6)
    constant = ConcordanceLoss()(torch.full((4, 1), 0.25), targets)
    assert constant.item() == pytest.approx(1)  # predictions without variance have CCC 0


def test_concordance_without_two_different_known_values_adds_nothing():
    # attributes: one known, none known, all equal (and met exactly), and one that is concordant by 8/13
    targets = torch.tensor([[0.3, UNKNOWN, 0.5, 0.0], [UNKNOWN, UNKNOWN, 0.5, 0.5], [UNKNOWN, UNKNOWN, 0.5, 1.0]])
    predictions = torch.tensor([[0.1, 0.2, 0.5, 0.0], [0.4, 0.3, 0.5, 0.25], [0.2, 0.8, 0.5, 0.5]], requires_grad=True)
    loss = ConcordanceLoss()(predictions, targets)
    assert loss.item() == pytest.approx((1 - 8 / 13) / 4)
    loss.backward()
    assert torch.equal(predictions.grad[:, :3], torch.zeros(3, 3)) and predictions.grad[:, 3].abs().max() > 0


def test_class_loss_by_hand():
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [1.0, 2.0]])
    loss = ClassLoss()(logits, torch.tensor([0, 1, -100]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + LOG2) / 3)


@pytest.mark.parametrize("weighting", ["none", "product", "normalized"])
@pytest.mark.parametrize("objective", ["kl", "soft_ce", "ce", "focal"])
def test_distribution_gradients_against_finite_differences(objective, weighting):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    targets[1, 2] = UNKNOWN
    options = {"focal_gamma": 1.5, "logit_adjustment": 0.5, "label_prior": [0.4, 0.3, 0.3, 0.0]}
    loss = DistributionLoss(objective, weighting, [0.5, 1.0, 3.0, 0.0], **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits)


@pytest.mark.parametrize("loss", [SquaredErrorLoss(100.0), ConcordanceLoss()])
def test_regression_gradients_against_finite_differences(loss):
    generator = torch.Generator().manual_seed(0)
    predictions = torch.rand(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    targets[0, 0] = UNKNOWN
    targets[1:, 2] = UNKNOWN
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), predictions)


def test_class_gradient_against_finite_differences():
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ClassLoss()(x, torch.tensor([0, -100, 1])), logits)


def test_prior_and_weights_by_hand():
    distributions = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [UNKNOWN] * 3, [1.0, 0, 0], [0.5, 0.5, 0]])
    prior = label_prior(distributions)
    assert prior.tolist() == [0.75, 0.25, 0.0]
    weights = label_weights(prior)
    assert weights.tolist() == pytest.approx([1 / 1.5, 1 / 0.5, 0.0])
    assert (prior * weights).sum().item() == pytest.approx(1)  # the mean clip weight


def test_absent_class_is_named_in_a_warning(caplog):
    label_weights([0.5, 0.5, 0.0], labels=["Happy", "Sad", "Contempt"])
    assert "['Contempt']" in caplog.text
    caplog.clear()
    label_weights([0.5, 0.5])
    assert not caplog.text


def test_prior_refuses_what_is_not_a_distribution():
    with pytest.raises(ValueError, match="Row 1 is not a distribution"):
        label_prior(torch.tensor([[0.5, 0.5], [3.0, 2.0]]))
    with pytest.raises(ValueError, match=r"Row 0 is not a distribution: \[0\.505, 0\.5\]"):
        label_prior(torch.tensor([[0.505, 0.5]], dtype=torch.float64))
    for wrong in ([1.5, -0.5], [1.5, -0.6]):
        with pytest.raises(ValueError, match="Row 0 is not a distribution"):
            label_prior(torch.tensor([wrong]))
    assert label_prior(torch.tensor([[0.5004, 0.5]])).sum().item() == pytest.approx(1)  # rounded shares will do
    with pytest.raises(ValueError, match="No training clip has votes"):
        label_prior(torch.full((2, 3), UNKNOWN))
    with pytest.raises(ValueError, match="shape"):
        label_prior(torch.tensor([0.5, 0.5]))
    for prior in ([0.0, 0.0], [-0.5, 1.5], [UNKNOWN, 1.0]):
        with pytest.raises(ValueError, match="label prior must be"):
            label_weights(prior)


def batch(rows=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    outputs = {
        "logits": random(rows, 3),
        "secondary_logits": random(rows, 17),
        "attributes": random(rows, 3).sigmoid(),
        "sex_logits": random(rows, 2),
        "age": 100 * random(rows).sigmoid(),
    }
    targets = {
        "labels": random(rows, 3).float().softmax(-1),
        "secondary_labels": random(rows, 17).float().softmax(-1),
        "attribute_labels": torch.rand(rows, 3, generator=generator),
        "sex_labels": torch.arange(rows) % 2,
        "age_labels": torch.linspace(20, 60, rows),
    }
    return outputs, targets


def unknown_rows(targets, rows):
    targets = {name: values.clone() for name, values in targets.items()}
    for name, values in targets.items():
        values[rows] = -100 if name == "sex_labels" else UNKNOWN
    return targets


def test_objective_names_its_parts_and_weighs_their_sum():
    settings = ObjectiveSettings(secondary_weight=0.5, attribute_weight=2.0, sex_weight=0.25, age_weight=3.0)
    outputs, targets = batch()
    losses = SailerObjective(settings, WEIGHTS)(ModelOutput(outputs), targets)
    assert list(losses) == ["primary", "secondary", "attributes", "sex", "age", "loss"]
    assert all(loss.shape == () for loss in losses.values())
    expected = {
        "primary": DistributionLoss("kl", "product", WEIGHTS)(outputs["logits"], targets["labels"]),
        "secondary": DistributionLoss()(outputs["secondary_logits"], targets["secondary_labels"]),
        "attributes": SquaredErrorLoss()(outputs["attributes"], targets["attribute_labels"]),
        "sex": ClassLoss()(outputs["sex_logits"], targets["sex_labels"]),
        "age": SquaredErrorLoss(100.0)(outputs["age"], targets["age_labels"]),
    }
    for name, value in expected.items():
        assert torch.equal(losses[name], value)
    total = sum(weight * expected[name] for name, weight in zip(expected, (1, 0.5, 2, 0.25, 3), strict=True))
    torch.testing.assert_close(losses["loss"], total)


def test_objective_skips_missing_heads_and_takes_concordance():
    outputs, targets = batch()
    outputs = {"logits": outputs["logits"], "attributes": outputs["attributes"], "age": None}
    settings = ObjectiveSettings(attribute_loss="ccc", target_weighting="none")
    losses = SailerObjective(settings)(outputs, targets)
    assert list(losses) == ["primary", "attributes", "loss"]
    assert torch.equal(losses["attributes"], ConcordanceLoss()(outputs["attributes"], targets["attribute_labels"]))


def test_halves_of_a_batch_average_to_the_whole():
    outputs, targets = batch(8)
    targets = unknown_rows(targets, [0, 1, 6])
    objective = SailerObjective(ObjectiveSettings(), WEIGHTS)
    halves = [
        objective({n: v[part] for n, v in outputs.items()}, {n: v[part] for n, v in targets.items()})["loss"]
        for part in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(halves) / 2, objective(outputs, targets)["loss"])


@pytest.mark.parametrize("attribute_loss", ["mse", "ccc"])
@pytest.mark.parametrize("objective", ["kl", "soft_ce", "ce", "focal"])
def test_unknown_rows_add_nothing_to_value_or_gradient(objective, attribute_loss):
    settings = ObjectiveSettings(objective=objective, attribute_loss=attribute_loss, focal_gamma=0.5)
    judge = SailerObjective(settings, WEIGHTS)
    outputs, targets = batch(6)
    outputs = {name: values.requires_grad_() for name, values in outputs.items()}
    losses = judge(outputs, unknown_rows(targets, [1, 4]))
    losses["loss"].backward()
    rest = judge(*({n: v[[0, 2, 3, 5]] for n, v in values.items()} for values in (outputs, targets)))
    for name, loss in losses.items():
        if attribute_loss == "mse" or name in ("primary", "secondary", "sex", "age"):
            torch.testing.assert_close(loss, rest[name] * 4 / 6)
        assert loss.isfinite()
    for values in outputs.values():
        assert torch.equal(values.grad[[1, 4]], torch.zeros_like(values.grad[[1, 4]]))
        assert values.grad[[0, 2, 3, 5]].abs().min() > 0


@pytest.mark.parametrize("attribute_loss", ["mse", "ccc"])
def test_a_batch_of_unknowns_is_zero_with_zero_gradients(attribute_loss):
    outputs, targets = batch()
    outputs = {name: values.requires_grad_() for name, values in outputs.items()}
    objective = SailerObjective(ObjectiveSettings(attribute_loss=attribute_loss), WEIGHTS)
    losses = objective(outputs, unknown_rows(targets, slice(None)))
    losses["loss"].backward()
    assert all(loss.item() == 0 for loss in losses.values())
    assert all(torch.equal(values.grad, torch.zeros_like(values)) for values in outputs.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("objective", ["kl", "soft_ce", "focal"])
def test_half_precision_extremes_are_finite(objective, dtype):
    outputs, targets = batch(dtype=dtype)
    outputs["logits"] = torch.tensor([[6e4, -6e4, 0], [-6e4, 6e4, 6e4], [0, 0, 0], [1e-4, 0, 3e4]]).to(dtype)
    outputs = {name: values.requires_grad_() for name, values in outputs.items()}
    targets["labels"] = torch.eye(3)[[0, 0, 1, 2]]
    settings = ObjectiveSettings(objective=objective, attribute_loss="ccc", focal_gamma=0.5)
    with torch.autocast("cpu", dtype=dtype):
        losses = SailerObjective(settings, WEIGHTS)(outputs, targets)
    losses["loss"].backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(values.grad.isfinite().all() for values in outputs.values())


def test_implied_label_weights():
    prior = [0.5, 0.25, 0.25]
    assert SailerObjective(ObjectiveSettings(), WEIGHTS).implied_label_weights(3).tolist() == WEIGHTS
    none = ObjectiveSettings(target_weighting="none")
    assert SailerObjective(none, WEIGHTS).implied_label_weights(3).tolist() == [1, 1, 1]
    adjusted = ObjectiveSettings(target_weighting="none", logit_adjustment_train=2.0)
    assert SailerObjective(adjusted, None, prior).implied_label_weights(3).tolist() == pytest.approx([4, 16, 16])


def test_a_minimum_of_the_adjusted_loss_carries_the_implied_weights():
    distribution = torch.tensor([[0.2, 0.3, 0.5]])
    settings = ObjectiveSettings(logit_adjustment_train=0.7, target_weighting="product")
    objective = SailerObjective(settings, WEIGHTS, [0.5, 0.3, 0.2])
    implied = objective.implied_label_weights(3)
    target = distribution * implied / (distribution * implied).sum()
    logits = target.log().requires_grad_()
    objective({"logits": logits}, {"labels": distribution})["loss"].backward()
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3), rtol=0, atol=1e-6)


def test_the_defaults_are_the_papers():
    assert DistributionLoss("focal").focal_gamma == 2.0
    papers = {"objective": "kl", "target_weighting": "product", "attribute_loss": "mse"}
    papers |= dict.fromkeys(("secondary_weight", "attribute_weight", "sex_weight", "age_weight"), 1.0)
    papers |= {"focal_gamma": 2.0, "logit_adjustment_train": 0.0}
    papers |= {"teacher": None, "distil_temperature": 2.0, "distil_weight": 0.5}  # without effect on the paper's
    assert dataclasses.asdict(ObjectiveSettings()) == papers


def test_settings_and_inputs_that_cannot_be():
    with pytest.raises(ValueError, match=r"objective is 'mse'; choose one of kl, soft_ce, ce, focal, distil"):
        ObjectiveSettings(objective="mse")
    for value in (-1.0, math.nan, math.inf, "much"):
        with pytest.raises(ValueError, match="attribute_weight is"):
            ObjectiveSettings(attribute_weight=value)
    with pytest.raises(ValueError, match="needs label_weights"):
        SailerObjective(ObjectiveSettings())
    with pytest.raises(ValueError, match="label_weights must be"):
        SailerObjective(ObjectiveSettings(), [1.0, math.inf])
    with pytest.raises(ValueError, match="needs label_prior"):
        SailerObjective(ObjectiveSettings(target_weighting="none", logit_adjustment_train=1.0))
    objective = SailerObjective(ObjectiveSettings(target_weighting="none"))
    outputs, targets = batch()
    with pytest.raises(ValueError, match="no 'age_labels'"):
        objective(outputs, {name: values for name, values in targets.items() if name != "age_labels"})
    with pytest.raises(ValueError, match="differ in shape"):
        objective(outputs, {**targets, "labels": targets["labels"][:, :2]})
    with pytest.raises(ValueError, match="model's output"):
        objective({"embeddings": torch.zeros(2, 4)}, targets)
