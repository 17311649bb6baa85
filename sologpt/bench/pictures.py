"""Pictures of figures. They need matplotlib, which may be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, DARK_GREY = '0.7', '0.45'


def draw_picture(path: str, size: tuple[float, float], draw: Callable[..., None], *args) -> Figure | None:
    """
    Call draw(figure, *args) with a new Figure of `size` inches, and save it at `path`. Returns the Figure, or None with
    a line that says so if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot it needs no display and opens no window
    except ImportError:
        print('no picture: matplotlib is not installed (pip install matplotlib)')
        return None
    figure = Figure(figsize=size, dpi=110, layout='constrained')
    draw(figure, *args)
    figure.savefig(path)
    print(f'picture: {path}')
    return figure


def style_axes(axes: Axes, title: str, x: str, y: str = '', grid: str = 'both') -> None:
    """A title that says what is shown, labels with units, and a light grid. grid: 'x', 'y' or 'both'."""
    axes.set_title(title, fontsize='medium')
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, axis=grid)
    axes.spines[['top', 'right']].set_visible(False)


def moving_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and the `window` - 1 before it, so that noise does not hide the course."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means
