"""What matplotlib draws of samples: grids of them, the confusion matrix, a training batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tl_modules.batch.task import draw_input
from tl_modules.errors import UserError
from tl_modules.module import TransferModule


def raw(x: Any, title: str) -> Callable[[Any], str]:
    """What draws a raw input."""

    def draw(axes: Any) -> str:
        draw_input(axes, x)
        return title

    return draw


def batch_figure(module: TransferModule, domains: Mapping[str, Sequence[tuple[Any, Any]]]) -> Any:
    """Returns a figure of raw samples, 8 in a row, those of each domain below its name.

    Args:
        module: Its task draws them.
        domains: Samples (x, y) of each; y is None where labels are hidden.
    """
    from matplotlib.figure import Figure

    rows = [-(-len(each) // 8) for each in domains.values()]
    figure = Figure(figsize=(13, sum(0.4 + 1.9 * count for count in rows)), dpi=100)
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=[0.4 + 1.9 * count for count in rows])
    for part, count, (name, pairs) in zip(parts[:, 0], rows, domains.items(), strict=True):
        height = 0.4 + 1.9 * count
        part.suptitle(name, x=0.01, y=1 - 0.05 / height, ha="left", weight="bold", size=11, parse_math=False)
        draw = [lambda axes, x=x, y=y: _short(module.draw(axes, x, y, None)) for x, y in pairs]
        _fill(part, draw, 8, top=1 - 0.52 / height)
    return figure


def save_figure(figure: Any, file: Path) -> None:
    """Writes a figure as a PNG.

    Raises:
        UserError: It cannot be written.
    """
    try:
        figure.savefig(file, format="png")
    except OSError as error:
        raise UserError(f"out: {file} cannot be written ({error.strerror})") from error


def _short(title: str, most: int = 22) -> str:
    return title if len(title) <= most else title[: most - 1] + "\u2026"


def grid(drawn: Sequence[Callable[[Any], str]]) -> Any:
    """Up to 16 samples in rows of 4; each is drawn by a function of the axes that returns its title."""
    from matplotlib.figure import Figure

    rows = -(-len(drawn) // 4)
    figure = Figure(figsize=(9, 2.4 * rows), dpi=80)  # a constrained layout would take a second
    _fill(figure, drawn, 4, top=1 - 0.3 / (2.4 * rows))
    return figure


def _fill(figure: Any, drawn: Sequence[Callable[[Any], str]], columns: int, top: float) -> None:
    for place, draw in enumerate(drawn):
        axes = figure.add_subplot(-(-len(drawn) // columns), columns, place + 1)
        axes.set_title(draw(axes), fontsize=9, parse_math=False)  # $ is a letter of a name
        axes.axis("off")
    figure.subplots_adjust(0.02, 0.02, 0.98, top, 0.1, 0.2)


def confusion(pairs: Mapping[tuple[int, int], int], names: list[str]) -> Any:
    """True classes down, predicted across; a row sums to 1, the numbers are counts."""
    from matplotlib.figure import Figure

    counts = torch.zeros(len(names), len(names))
    for pair, times in pairs.items():
        counts[pair] = times
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = max(5.0, 0.55 * len(names) + 1.5)
    figure = Figure(figsize=(side, side), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 30:
        for row in range(len(names)):
            for column in range(len(names)):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    text = str(int(counts[row, column]))
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure
