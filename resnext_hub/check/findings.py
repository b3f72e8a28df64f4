"""What is wrong or unusual with a dataset, from a survey of its images."""

from collections import Counter
from dataclasses import dataclass

from resnext_hub.check.survey import Survey
from resnext_hub.data.duplicates import duplicate_groups
from resnext_hub.data.examine import Facts
from resnext_hub.data.images import count_labels
from resnext_hub.training.balance import SMALL_CLASS


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images with the same content."""

    images: tuple[Facts, ...]
    exact: bool
    """Whether all of them are the same bytes."""

    splits: tuple[str, ...]
    """The splits that they are in; parts of one split count as one if training keeps duplicates together."""

    @property
    def labels(self) -> tuple[tuple[int, ...], ...]:
        """What they are labeled with, without repetitions."""
        return tuple(sorted({facts.labels for facts in self.images}))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a check."""

    label_names: tuple[str, ...]
    counts: dict[str, tuple[int, ...]]
    """Images of each class, by split."""
    totals: dict[str, int]
    """Images by split."""
    sizes: dict[str, tuple[int, int]]
    """Width and height of the smallest, the median and the largest image, by number of pixels."""
    modes: dict[str, int]
    """Number of images by mode."""
    unreadable: tuple[Facts, ...]
    blank: tuple[Facts, ...]
    """Images of a single color."""
    groups: tuple[Group, ...]
    """Duplicates, the worst first: with several labels, then across splits, then all others."""

    @property
    def train(self) -> str:
        """Name of the training split."""
        return next(iter(self.counts))

    @property
    def conflicts(self) -> tuple[Group, ...]:
        """Duplicates with different labels."""
        return tuple(group for group in self.groups if len(group.labels) > 1)

    @property
    def leaks(self) -> tuple[Group, ...]:
        """Duplicates across splits."""
        return tuple(group for group in self.groups if len(group.splits) > 1)

    @property
    def imbalance(self) -> float:
        """Training images of the largest class over those of the smallest one that has any."""
        filled = [count for count in self.counts[self.train] if count]
        return max(filled) / min(filled)

    def missing(self, split: str) -> tuple[str, ...]:
        """Return the classes without images in a split."""
        return tuple(name for name, count in zip(self.label_names, self.counts[split], strict=True) if not count)

    def small(self, split: str) -> tuple[str, ...]:
        """Return the classes with too few images in a split to measure their accuracy."""
        pairs = zip(self.label_names, self.counts[split], strict=True)
        return tuple(name for name, count in pairs if 0 < count < SMALL_CLASS)

    def excluded(self) -> list[tuple[Facts, str]]:
        """Return the images to leave out so that no problem and no duplicate remains, and the reasons.

        Of duplicates with the same label one image is kept, in an evaluation split if there is one, so that training
        splits shrink and evaluations stay comparable. Of duplicates with different labels none is kept.
        """
        found = [(facts, f"unreadable: {facts.reason}") for facts in self.unreadable]
        for group in self.groups:
            kept = next((facts for facts in group.images if facts.split != self.train), group.images[0])
            for facts in group.images:
                if len(group.labels) > 1:
                    found.append((facts, "duplicates with different labels"))
                elif facts is not kept:
                    found.append((facts, f"duplicate of {kept.split}: {kept.name}"))
        return found

    @property
    def problems(self) -> int:
        """Number of findings that spoil a result: unreadable images, conflicting labels, duplicates across splits."""
        spoiled = {id(group) for group in (*self.conflicts, *self.leaks)}
        return len(self.unreadable) + len(spoiled)


def examine(survey: Survey) -> Findings:
    """Return the findings of a survey."""
    images = survey.images
    readable = [facts for facts in images if facts.size is not None]
    by_pixels = sorted((facts.size for facts in readable if facts.size), key=lambda size: (size[0] * size[1], size))
    places = {"smallest": 0, "median": len(by_pixels) // 2, "largest": -1}
    return Findings(
        label_names=survey.label_names,
        counts={
            name: tuple(count_labels(split.labels, len(survey.label_names)).tolist())
            for name, split in survey.splits.items()
        },
        totals={name: len(split) for name, split in survey.splits.items()},
        sizes={what: by_pixels[place] for what, place in places.items()} if by_pixels else {},
        modes=dict(Counter(facts.mode for facts in readable).most_common()),
        unreadable=tuple(facts for facts in images if facts.size is None),
        blank=tuple(facts for facts in readable if facts.blank),
        groups=_groups(survey),
    )


def _groups(survey: Survey) -> tuple[Group, ...]:
    groups = []
    for members in duplicate_groups(survey):
        facts = tuple(survey.images[index] for index in members)
        parts = dict.fromkeys(fact.split for fact in facts)
        splits = dict.fromkeys(survey.stored[part] if survey.kept_together else part for part in parts)
        exact = len({fact.digest for fact in facts}) == 1
        groups.append(Group(images=facts, splits=tuple(splits), exact=exact))
    return tuple(sorted(groups, key=lambda group: (len(group.labels) < 2, len(group.splits) < 2)))
