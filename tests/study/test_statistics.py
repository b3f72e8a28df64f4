"""Verdicts follow from paired intervals alone."""

import math
import statistics

from pytest import approx, mark
from scipy import stats

from resnext_hub.study.statistics import compare, half_width, sentence, summarize


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    ours, theirs = by_seed(91.0, 92.5, 90.0, 93.0), by_seed(90.0, 91.0, 90.5, 91.0)
    found = compare("a", "b", ours, theirs)
    expected = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval(0.95)
    assert (found.low, found.high) == (approx(expected.low), approx(expected.high))


def test_several_comparisons_widen_the_interval() -> None:
    ours, theirs = by_seed(91.0, 92.5, 90.0, 93.0), by_seed(90.0, 91.0, 90.5, 91.0)
    found = compare("a", "b", ours, theirs, comparisons=5)
    expected = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval(0.99)
    assert (found.low, found.high) == (approx(expected.low), approx(expected.high))


@mark.parametrize(
    ("ours", "theirs", "verdict", "words"),
    [
        (by_seed(92.0, 93.1, 92.2), by_seed(90.0, 91.0, 90.1), "gain", "a is more accurate than b"),
        (by_seed(90.0, 91.0, 90.1), by_seed(92.0, 93.1, 92.2), "loss", "a is less accurate than b"),
        (by_seed(90.0, 93.0, 90.1), by_seed(91.0, 91.0, 90.2), "undecided", "do not distinguish a from b"),
        (by_seed(90.0), by_seed(91.0), "undecided", "only one seed in their finished runs"),
        ({0: 90.0}, {1: 91.0}, "undecided", "no finished runs with the same seed"),
        ({}, {}, "undecided", "no finished runs with the same seed"),
    ],
    ids=["gain", "loss", "undecided", "one seed", "other seeds", "none"],
)
def test_the_verdict_follows_from_the_interval(ours: dict, theirs: dict, verdict: str, words: str) -> None:
    found = compare("a", "b", ours, theirs)
    assert found.verdict == verdict
    assert words in sentence(found)


def test_only_seeds_of_both_are_compared() -> None:
    ours = {0: 92.0, 1: 93.1, 2: 92.2, 3: 50.0, 7: 10.0}
    theirs = {0: 90.0, 1: 91.0, 2: 90.1, 5: 99.0}
    found = compare("a", "b", ours, theirs)
    assert found == compare("a", "b", {k: ours[k] for k in range(3)}, {k: theirs[k] for k in range(3)})
    assert found.seeds == (0, 1, 2)
    assert "over 3 paired seeds" in sentence(found)


def test_the_number_of_seeds_that_would_decide_is_the_smallest_whose_interval_excludes_zero() -> None:
    differences = (0.4, -0.3, 0.5, 0.1)
    found = compare("a", "b", by_seed(*(90 + d for d in differences)), by_seed(*(90.0,) * 4), comparisons=3)
    sd, mean = statistics.stdev(differences), statistics.fmean(differences)
    assert found.seeds_needed is not None
    assert half_width(sd, found.seeds_needed, 3) < mean <= half_width(sd, found.seeds_needed - 1, 3)
    assert f"about {found.seeds_needed - 4} more seeds would be needed" in sentence(found)


def test_a_vanishing_difference_is_said_to_need_too_many_seeds() -> None:
    found = compare("a", "b", by_seed(90.0, 91.0, 89.0), by_seed(90.0, 90.0, 90.0))
    assert found.seeds_needed is None
    assert "more than 1,000 seeds" in sentence(found)


def test_seeds_that_agree_by_chance_do_not_make_a_certainty() -> None:
    # in steps of one image of 100, two differences of one image each say little
    exact = compare("a", "b", by_seed(91.0, 92.0), by_seed(90.0, 91.0))
    found = compare("a", "b", by_seed(91.0, 92.0), by_seed(90.0, 91.0), resolution=1.0)
    assert exact.verdict == "gain"
    assert found.verdict == "undecided"
    assert found.high - found.mean == approx(stats.t.ppf(0.975, 1) / math.sqrt(2))


def test_a_summary_has_no_deviation_with_one_seed() -> None:
    assert summarize({}) is None
    one = summarize({3: 90.0})
    assert one is not None
    assert (one.mean, one.sd, one.seeds) == (90.0, None, (3,))
    two = summarize({3: 90.0, 1: 92.0})
    assert two is not None
    assert (two.mean, two.sd, two.seeds) == (91.0, approx(math.sqrt(2)), (1, 3))
