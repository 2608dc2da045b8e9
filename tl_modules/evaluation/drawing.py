"""Matplotlib figures of samples: grids, the confusion matrix, a training batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tl_modules.batch.task import draw_input
from tl_modules.checkpoints.files import replacing
from tl_modules.module import TransferModule

CLASSES = 30  # in a confusion matrix, which grows with their square
LETTERS = 40  # in a title or a class name
DRAWN = 512  # samples of a training batch in total


def raw(x: Any, title: str, schema: Mapping[str, Any]) -> Callable[[Any], str]:
    """Returns a function that draws a raw input, which `schema` describes."""

    def draw(axes: Any) -> str:
        draw_input(axes, x, schema)
        return title

    return draw


def batch_figure(module: TransferModule, domains: Mapping[str, Sequence[tuple[Any, Any]]]) -> Any:
    """Returns a figure of raw samples, 8 in a row, grouped by domain.

    Args:
        module: The module, whose task draws them.
        domains: Samples (x, y) of each domain; y is None if labels are hidden.
    """
    from matplotlib.figure import Figure

    rows = [-(-len(each) // 8) for each in domains.values()]
    figure = Figure(figsize=(13, sum(0.4 + 1.9 * count for count in rows)), dpi=100)
    parts = figure.subfigures(len(rows), squeeze=False, height_ratios=[0.4 + 1.9 * count for count in rows])
    for part, count, (name, pairs) in zip(parts[:, 0], rows, domains.items(), strict=True):
        height = 0.4 + 1.9 * count
        part.suptitle(name, x=0.01, y=1 - 0.05 / height, ha="left", weight="bold", size=11, parse_math=False)
        draw = [lambda axes, x=x, y=y: short(module.draw(axes, x, y, None), 22) for x, y in pairs]
        _fill(part, draw, 8, top=1 - 0.52 / height)
    return figure


def save_figure(figure: Any, file: Path, **options: Any) -> None:
    """Writes a figure as a PNG, with options of matplotlib's `savefig`.

    Raises:
        UserError: The file cannot be written.
    """
    with replacing(file) as part:
        figure.savefig(part, format="png", **options)


def short(title: str, most: int = LETTERS) -> str:
    """Shortens a title or a name."""
    title = " ".join(title.split())
    return title if len(title) <= most else title[: most - 1] + "\u2026"


def grid(drawn: Sequence[Callable[[Any], str]]) -> Any:
    """Draws up to 16 samples in rows of 4; each is drawn by a function of the axes that returns its title."""
    from matplotlib.figure import Figure

    rows = -(-len(drawn) // 4)
    figure = Figure(figsize=(9, 2.4 * rows), dpi=80)  # a constrained layout takes a second
    _fill(figure, drawn, 4, top=1 - 0.3 / (2.4 * rows))
    return figure


def _fill(figure: Any, drawn: Sequence[Callable[[Any], str]], columns: int, top: float) -> None:
    for position, draw in enumerate(drawn):
        axes = figure.add_subplot(-(-len(drawn) // columns), columns, position + 1)
        axes.set_title(short(draw(axes)), fontsize=9, parse_math=False)  # a name may have a $
        axes.axis("off")
    figure.subplots_adjust(0.02, 0.02, 0.98, top, 0.1, 0.2)


def confusion(pairs: Mapping[tuple[int, int], int], names: Sequence[str]) -> Any:
    """Draws the confusion matrix: true classes down, predicted across; colours are shares, the numbers are counts.

    Of many classes those with the most mistakes are drawn, as the title says.

    Args:
        pairs: The count of each (true, predicted).
        names: The names of all classes.
    """
    from matplotlib.figure import Figure

    totals: Counter[int] = Counter()
    mistakes: Counter[int] = Counter()
    for (true, guess), times in pairs.items():
        totals[true] += times
        if true != guess:
            mistakes.update({true: times, guess: times})
    drawn = sorted(sorted(range(len(names)), key=lambda number: -mistakes[number])[:CLASSES])
    counts = torch.tensor([[pairs.get((true, guess), 0) for guess in drawn] for true in drawn])
    shares = counts / torch.tensor([[max(1, totals[true])] for true in drawn])
    side = max(5.0, 0.55 * len(drawn) + 1.5)
    figure = Figure(figsize=(side, side), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if len(drawn) < len(names):
        axes.set_title(f"the {len(drawn)} of {len(names):,} classes that are confused most")
    labels = [short(names[number]) for number in drawn]
    axes.set_xticks(range(len(drawn)), labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(drawn)), labels, parse_math=False)
    for row, column in counts.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8)
    return figure
