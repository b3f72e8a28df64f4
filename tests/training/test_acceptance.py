"""Accepted answers are as precise as asked, on images that nothing was fitted on."""

import numpy as np
from pytest import approx, mark

from resnext_hub.training.acceptance import PRECISIONS, cross_measure, fit_acceptance, measure_acceptance
from resnext_hub.training.temperature import FOLDS


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of answers, and which are right: about 85 % of them, somewhat fewer than stated."""
    generator = np.random.default_rng(seed)
    probabilities = generator.beta(5, 0.8, count)
    return probabilities, generator.random(count) < probabilities**1.1


@mark.parametrize("count", [300, 1000])
def test_an_asked_precision_is_met_on_new_images_in_18_of_20_seeds(count: int) -> None:
    met = dict.fromkeys((0.9, 0.95, 0.99), 0)
    accepted = dict.fromkeys(met, 0)
    new = drawn(100_000, 1_000_000)
    for seed in range(20):
        fitted = fit_acceptance(*drawn(count, seed))
        for facts in measure_acceptance(fitted, *new):
            met[facts.precision] += facts.right >= facts.precision * facts.answered
            accepted[facts.precision] += 1
        for precision in met.keys() - fitted.keys():  # nothing is promised, so nothing is broken
            met[precision] += 1
    assert min(met.values()) >= 18
    assert accepted[0.9] > 10


def test_a_higher_precision_needs_a_higher_probability() -> None:
    fitted = fit_acceptance(*drawn(5000, 0))
    assert list(fitted) == list(PRECISIONS[: len(fitted)])
    assert list(fitted.values()) == sorted(fitted.values())
    assert 0.9 < fitted[0.97] < 1


def test_every_answer_is_accepted_if_all_are_precise_enough() -> None:
    probabilities = np.linspace(0.3, 1, 1000)
    assert fit_acceptance(probabilities, np.arange(1000) % 10 > 0)[0.85] == 0.0


def test_nothing_is_fitted_to_few_images_or_for_a_precision_that_no_answer_has() -> None:
    assert fit_acceptance(*drawn(49, 0)) == {}
    probabilities = np.random.default_rng(0).random(1000)
    assert max(fit_acceptance(probabilities, np.arange(1000) % 4 > 0)) < 0.75


def test_equally_probable_answers_are_accepted_together() -> None:
    probabilities = np.repeat([0.9, 0.6], 500)
    right = np.concatenate([np.ones(500), np.arange(500) < 250]).astype(bool)  # the first half of the others
    fitted = fit_acceptance(probabilities, right)
    for precision in (0.85, 0.95, 0.98):
        assert fitted[precision] == approx(0.9)
    assert fitted[0.7] == 0.0


def test_the_evaluation_images_are_measured_with_what_was_fitted_on_others() -> None:
    probabilities, right = drawn(2000, 0)
    part = np.random.default_rng(0).permutation(2000) % FOLDS
    answered = correct = 0
    for fold in range(FOLDS):
        inside = part == fold
        accepted = probabilities[inside] >= fit_acceptance(probabilities[~inside], right[~inside])[0.95]
        answered += int(accepted.sum())
        correct += int((right[inside] & accepted).sum())
    (facts,) = (facts for facts in cross_measure(probabilities, right) if facts.precision == 0.95)
    assert (facts.answered, facts.right, facts.count) == (answered, correct, 2000)
