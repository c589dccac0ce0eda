"""How the report looks: colours, lines and names of the policies, and numbers with their intervals.

Figures are readable in grey: lines differ in dash and marker too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Okabe and Ito's palette, whose colours the colour-blind tell apart
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
SKY, YELLOW = "#56B4E9", "#E69F00"
VARIANT_STYLES = {
    "pretrained": {"color": GREY, "linestyle": ":", "marker": "s"},
    "ppo-full": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "ppo-lora": {"color": ORANGE, "linestyle": "--", "marker": "^"},
    "ppo-leave-one-out": {"color": SKY, "linestyle": ":", "marker": "v"},
    "ppo-group": {"color": YELLOW, "linestyle": "--", "marker": "<"},
    "dpo": {"color": PURPLE, "linestyle": "-", "marker": "P"},
}
STYLE = {
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.markersize": 4,
}
plt.rcParams.update(STYLE)
POLICY_NAMES = {
    "pretrained": "pretrained",
    "ppo-full": "PPO, full",
    "ppo-lora": "PPO, LoRA",
    "ppo-leave-one-out": "leave one out (RLOO)",
    "ppo-group": "group (GRPO)",
    "dpo": "DPO",
}


def panels(count: int, *, height: float = 2.6, width: float = 7.0) -> tuple[Figure, Sequence[Axes]]:
    """Some axes side by side."""
    figure, axes = plt.subplots(1, count, figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(axes)


def count_axis(ax: Axes, *, axis: str = "x") -> None:
    """Ticks at whole steps only."""
    getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator(integer=True, nbins=6))


def log_axis(ax: Axes) -> None:
    """A logarithmic axis with few, plain labels, also over less than a decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def legend_above(figure: Figure, ax: Axes) -> None:
    """One legend for all panels, of the lines of one of them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))


def from_zero(ax: Axes) -> None:
    """An axis that begins at zero, with room above the highest line."""
    ax.set_ylim(0, 1.08 * ax.dataLim.y1 or None)


def line_style(stage: str, count: int) -> dict[str, Any]:
    """How a line of so many points looks, with about ten markers; a further seed's is thin."""
    style = VARIANT_STYLES[variant_of(stage)]
    if stage not in VARIANT_STYLES:
        return style | {"marker": "", "linewidth": 0.8, "alpha": 0.6}
    return style | {"label": policy_name(stage), "markevery": max(1, count // 10)}


def with_interval(own: Mapping[str, float], digits: int = 3) -> str:
    """An estimate with its 95 % interval, for prose and tables; a dash where there is none."""
    if own["value"] is None:
        return "–"
    return f"{own['value']:.{digits}f} [{own['low']:.{digits}f}, {own['high']:.{digits}f}]"


def percent_with_interval(own: Mapping[str, float]) -> str:
    """A share with its 95 % interval, in per cent."""
    return f"{own['value']:.1%} [{own['low']:.1%}, {own['high']:.1%}]"


def by_sign(own: Mapping[str, float], above: str, below: str, neither: str) -> str:
    """One of three wordings: the whole 95 % interval is above zero, below it, or neither."""
    return above if own["low"] > 0 else below if own["high"] < 0 else neither


def policy_name(stage: str) -> str:
    """How a policy is called: the stage "ppo-lora-1" is LoRA with the next seed."""
    seed = stage.removeprefix(variant_of(stage)).removeprefix("-")
    return POLICY_NAMES[variant_of(stage)] + (f", seed {seed}" if seed else "")


def variant_of(stage: str) -> str:
    """The stage of which this one repeats the training with another seed; mostly itself."""
    return stage if stage in POLICY_NAMES else stage.rpartition("-")[0]


def mean_with_interval(own: Mapping[str, float] | None, digits: int = 3) -> str:
    """A mean with its 95 % interval; a dash for none."""
    if own is None:
        return "–"
    mean, low, high = (short(own[name], digits) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def short(value: float, digits: int = 3) -> str:
    """So many digits, and all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def listed(names: Iterable[str]) -> str:
    """Names in a sentence."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
