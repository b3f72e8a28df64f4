"""The trackers that a run can use, by name."""

from importlib.util import find_spec

from resnext_hub.errors import RequestError, setting
from resnext_hub.settings import did_you_mean, shown

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
"""Names of the trackers; each is also the name of a package, and of the extra that installs it."""


def tracker_names(listed: str | None) -> tuple[str, ...]:
    """Return the names in a list that is separated by commas; none if there is no list.

    Raises:
        RequestError: If a name is unknown, or given twice.
    """
    names = () if listed is None else tuple(name.strip() for name in listed.split(","))
    for name in names:
        if name not in TRACKERS:
            raise RequestError(
                f"{setting('track', shown(listed))}: expected one or more of {', '.join(TRACKERS)}, separated by "
                f"commas{did_you_mean(name.lower(), TRACKERS)}"
            )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RequestError(f"{setting('track', shown(listed))} lists {twice} twice; list each tracker only once")
    return names


def require_trackers(listed: str | None) -> None:
    """Raise RequestError if the package of a tracker is missing; the message names the extra that installs it."""
    for name in tracker_names(listed):
        if find_spec(name) is None:
            raise RequestError(
                f'{setting("track", name)} needs {name}, which is not installed; pip install "resnext-hub[{name}]"'
            )
