"""Paired comparison of two members over seeds, and the verdict that follows from its interval."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95
"""Probability that all intervals of a study together cover the true differences."""

MOST_SEEDS = 1000
"""Largest number of seeds that is estimated; beyond it the estimate means little."""

Verdict = Literal["gain", "loss", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Accuracy of one member over its seeds."""

    seeds: tuple[int, ...]
    mean: float
    sd: float | None
    """Sample standard deviation; None with fewer than two seeds."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference in accuracy of a member and its baseline, both in percentage points, over the seeds of both."""

    member: str
    baseline: str
    seeds: tuple[int, ...]
    """Seeds that both have finished."""
    mean: float | None
    """None without such a seed."""
    sd: float | None
    """Sample standard deviation of the paired differences; None with fewer than two seeds."""
    low: float | None
    high: float | None
    """Ends of the interval of the mean; None with fewer than two seeds."""
    seeds_needed: int | None
    """Seeds after which a difference of this mean and deviation would be decided; None if it is, or cannot be told."""

    @property
    def verdict(self) -> Verdict:
        """Whether the interval excludes zero, and on which side."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "gain" if self.low > 0 else "loss"


def summarize(accuracy: Mapping[int, float]) -> Summary | None:
    """Return mean and standard deviation of accuracy by seed, or None without any."""
    if not accuracy:
        return None
    values = list(accuracy.values())
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Summary(seeds=tuple(sorted(accuracy)), mean=statistics.fmean(values), sd=sd)


def compare(
    member: str,
    baseline: str,
    accuracy: Mapping[int, float],
    reference: Mapping[int, float],
    comparisons: int = 1,
    resolution: float = 0.0,
) -> Difference:
    """Compare two members by the seeds that both have finished, with a paired t interval.

    The interval is widened for the number of comparisons (Bonferroni), so that all intervals of a study hold together
    with the probability `CONFIDENCE`. Differences over few seeds may agree by chance, since accuracy comes in steps of
    one image; their standard deviation is therefore taken to be at least such a step.

    Args:
        member: Name of the member.
        baseline: Name of what it is compared with.
        accuracy: Accuracy of the member by seed, in percent.
        reference: Accuracy of the baseline by seed, in percent.
        comparisons: Number of comparisons in the study.
        resolution: Percentage points of one image of the evaluation split.
    """
    seeds = tuple(sorted(accuracy.keys() & reference.keys()))
    differences = [accuracy[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(differences) if seeds else None
    if mean is None or len(seeds) < 2:
        return Difference(
            member=member, baseline=baseline, seeds=seeds, mean=mean, sd=None, low=None, high=None, seeds_needed=None
        )
    sd = max(statistics.stdev(differences), resolution)
    half = half_width(sd, len(seeds), comparisons)
    decided = half < abs(mean)
    return Difference(
        member=member,
        baseline=baseline,
        seeds=seeds,
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        seeds_needed=None if decided else _seeds_needed(mean, sd, comparisons, len(seeds)),
    )


def half_width(sd: float, seeds: int, comparisons: int = 1) -> float:
    """Return half the width of the interval of a mean difference.

    Args:
        sd: Sample standard deviation of the paired differences.
        seeds: Number of pairs, at least 2.
        comparisons: Number of comparisons in the study.
    """
    from scipy.stats import t

    tail = (1 - CONFIDENCE) / comparisons / 2
    return float(t.ppf(1 - tail, seeds - 1)) * sd / math.sqrt(seeds)


def _seeds_needed(mean: float, sd: float, comparisons: int, seeds: int) -> int | None:
    """Return the smallest larger number of seeds whose interval would exclude zero, or None beyond `MOST_SEEDS`."""
    for count in range(seeds + 1, MOST_SEEDS + 1):
        if half_width(sd, count, comparisons) < abs(mean):
            return count
    return None


def sentence(difference: Difference) -> str:
    """Return the verdict in words, which follow from the interval alone."""
    # without quotes, a comma in a name such as "deeper, 38 layers" would end a clause
    member, baseline = (f'"{name}"' if " " in name else name for name in (difference.member, difference.baseline))
    pair = f"{member} and {baseline}"
    if difference.mean is None:
        return f"**Not compared**: {pair} have no finished runs with the same seed."
    count = len(difference.seeds)
    over = f"over {count} paired seed{'s' if count > 1 else ''}"
    points = f"{difference.mean:+.2f} points"
    if difference.low is None or difference.high is None:
        return f"**Undecided**: {pair} share only one seed in their finished runs ({points}); an interval needs two."
    interval = f"{points}, interval {difference.low:+.2f} to {difference.high:+.2f}, {over}"
    if difference.verdict == "gain":
        return f"**{member} is more accurate than {baseline}** ({interval})."
    if difference.verdict == "loss":
        return f"**{member} is less accurate than {baseline}** ({interval})."
    if difference.seeds_needed is None:
        more = f"more than {MOST_SEEDS:,} seeds would be needed to resolve a difference this small"
    else:
        missing = difference.seeds_needed - count
        seeds = "1 more seed" if missing == 1 else f"{missing} more seeds"
        more = f"about {seeds} would be needed to resolve a difference of this size"
    versus = f"{member} from {baseline}"
    return f"**Undecided**: the data do not distinguish {versus} ({interval}); {more}."
