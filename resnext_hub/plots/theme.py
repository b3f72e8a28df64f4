"""Colors of a plot on a light or on a dark page."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.colors import Colormap


@dataclass(frozen=True, kw_only=True)
class Theme:
    """The colors of a plot."""

    name: str
    """`light` or `dark`."""
    paper: str
    """The background."""
    ink: str
    """Text, and other marks that have to stand out."""
    faint: str
    """Text and marks of less importance."""
    cycle: tuple[str, ...]
    """Colors of the first to the tenth series."""
    colormap: str | tuple[str, ...]
    """Colors of a matrix of fractions from low to high: the name of a colormap, or colors to interpolate between."""
    on_high: str
    """Text on high values of a matrix."""

    def settings(self) -> dict[str, Any]:
        """Return matplotlib's settings; those of the light theme are its defaults."""
        from cycler import cycler

        ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        paper = ("figure.facecolor", "axes.facecolor")
        return {
            **dict.fromkeys(ink, self.ink),
            **dict.fromkeys(paper, self.paper),
            "axes.prop_cycle": cycler(color=self.cycle),
        }

    @property
    def matrix(self) -> "str | Colormap":
        """Colormap of a matrix of fractions."""
        from matplotlib.colors import LinearSegmentedColormap

        colors = self.colormap
        return colors if isinstance(colors, str) else LinearSegmentedColormap.from_list("matrix", list(colors))


LIGHT = Theme(
    name="light",
    paper="white",
    ink="black",
    faint="gray",
    cycle=(
        *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
        *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
    ),
    colormap="Blues",
    on_high="white",
)

DARK = Theme(
    name="dark",
    paper="#15181c",
    ink="#e6e8eb",
    faint="#9aa3ad",
    cycle=(
        *("#6cb6ff", "#ffa657", "#6ddc7c", "#ff7b72", "#c9a4ff"),
        *("#d9a88f", "#ffa3dd", "#b4bac2", "#e3e05c", "#5fe0ee"),
    ),
    colormap=("#15181c", "#8fc7ff"),
    on_high="black",
)

THEMES = (LIGHT, DARK)

WIDTH = 7.8
"""Width of the plots of a model folder, in inches."""

PAGE_WIDTH = 6.4
"""Width of the plots of a report, in inches: on a page that is 600 pixels wide, text of 8 points is 10 pixels high."""
