"""A picture of a report: lines where cases are numbers, bars where they are names.

matplotlib is an extra; without it there is no picture and nothing else is missing.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from report import Metric, Report

COLUMNS = 2
SIZE_INCHES = (6.5, 4.2)      # of one metric
LEGEND_ROOM = 1.3             # above bars


def draw(report: Report, path: Path) -> Path | None:
    """``path`` once it is written; None without matplotlib or without samples."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [metric for metric in report.metrics if report.rows(metric.name)]
    if not metrics:
        return None
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(SIZE_INCHES[0] * columns, SIZE_INCHES[1] * rows), squeeze=False)
    for metric, axis in zip(metrics, axes.flat):
        _draw_metric(axis, report, metric)
    for axis in axes.flat[len(metrics):]:
        axis.set_visible(False)
    figure.suptitle(report.name.replace("_", " "))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_metric(axis: Any, report: Report, metric: Metric) -> None:
    rows = report.rows(metric.name)
    cases, engines = list(dict.fromkeys(case for case, _ in rows)), list(dict.fromkeys(engine for _, engine in rows))
    medians = {pair: statistics.median(report.values(*pair, metric.name)) for pair in rows}
    numeric = len(cases) > 1 and not any(isinstance(case, str) for case in cases)
    for i, engine in enumerate(engines):
        own = [case for case in cases if (case, engine) in medians]
        heights = [medians[case, engine] for case in own]
        if numeric:
            axis.plot(own, heights, marker="o", label=engine)
        else:
            width = 0.8 / len(engines)
            axis.bar([cases.index(case) + i * width - 0.4 + width / 2 for case in own], heights, width, label=engine)
    if numeric:
        axis.set_xscale("log", base=2)
        axis.set_xticks(cases, [str(case) for case in cases])
        axis.minorticks_off()
    else:
        axis.set_xticks(range(len(cases)), [str(case) for case in cases], rotation=20 if len(cases) > 4 else 0)
    axis.set_ylim(0, axis.get_ylim()[1] * (1 if numeric else LEGEND_ROOM))
    axis.set_xlabel(report.case_name)
    axis.set_ylabel(metric.unit)
    axis.set_title(metric.name, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
