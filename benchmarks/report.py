"""What every benchmark ends with: tables in Markdown on stdout, a JSON file with all rounds, a plot.

A benchmark adds samples (case, engine, metric, value), one a round, and names every engine
that did not run and why.  Ratios are made round by round, of values measured one after the
other, and then the median is taken: absolute figures drift on shared machines.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine

Case = str | int | float


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured quantity."""

    name: str                     # e.g. "decode alone"
    unit: str                     # e.g. "tokens/s"
    higher_is_better: bool = True
    digits: int = 1

    @property
    def title(self) -> str:
        return f"{self.name}, {self.unit}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one round."""

    case: Case
    engine: str
    metric: str
    value: float
    round: int


@dataclass(slots=True)
class Report:
    """Everything about one run of one benchmark."""

    name: str
    case_name: str                                   # what a case is, e.g. "width"
    metrics: Sequence[Metric]
    arguments: dict[str, Any]
    bases: list[str] = field(default_factory=list)   # engines that the others are compared with, in this order
    wide: bool = False                               # a column for each metric, and ratios apart, instead of a table each
    samples: list[Sample] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)     # name → what it says of itself
    missing: dict[str, str] = field(default_factory=dict)                # name → why it did not run
    notes: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)                    # Markdown below the tables
    watch: machine.Watch = field(default_factory=machine.Watch)

    def add(self, case: Case, engine: str, metric: str, value: float, number: int = 0) -> None:
        """``number``: of the round."""
        self.samples.append(Sample(case, engine, metric, value, number))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def values(self, case: Case, engine: str, metric: str) -> list[float]:
        """All rounds, in order."""
        return list(self._by_round(case, engine, metric).values())

    def finish(self, directory: Path) -> None:
        """Print the tables, write NAME.json and NAME.png."""
        from plot import draw

        directory.mkdir(parents=True, exist_ok=True)
        watched = self.watch.result()
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps(self.as_json(watched), indent=1) + "\n", encoding="utf-8")
        print(self.markdown(watched))
        picture = draw(self, directory / f"{self.name}.png")
        print(f"\n{path}" + (f", {picture}" if picture else "; no plot: matplotlib is not installed (the extra 'bench')"), flush=True)

    def as_json(self, watched: dict[str, float]) -> dict[str, Any]:
        return {"benchmark": self.name, "arguments": self.arguments, "machine": machine.facts(), "watch": watched,
                "engines": self.engines, "not_run": self.missing, "notes": self.notes,
                "metrics": [asdict(metric) for metric in self.metrics], "case": self.case_name,
                "rounds": [asdict(sample) for sample in self.samples], "medians": self.medians()}

    def medians(self) -> list[dict[str, Any]]:
        """One entry for each case, engine and metric, with the ratio to each base."""
        entries = []
        for metric in self.metrics:
            for case, engine in self.rows(metric.name):
                values = self.values(case, engine, metric.name)
                ratios = {base: self.ratio(case, engine, base, metric) for base in self.present_bases()}
                entries.append({"case": case, "engine": engine, "metric": metric.name, "median": statistics.median(values),
                                "ratios": {base: ratio for base, ratio in ratios.items() if ratio is not None}})
        return entries

    def ratio(self, case: Case, engine: str, base: str, metric: Metric) -> float | None:
        """How many times better than ``base``; None where either has no value, or they are the same."""
        ours, theirs = self._by_round(case, engine, metric.name), self._by_round(case, base, metric.name)
        pairs = [(ours[number], theirs[number]) for number in ours if number in theirs]
        if engine == base or not pairs or not all(a and b for a, b in pairs):
            return None
        return statistics.median(a / b if metric.higher_is_better else b / a for a, b in pairs)

    def _by_round(self, case: Case, engine: str, metric: str) -> dict[int, float]:
        return {s.round: s.value for s in self.samples if (s.case, s.engine, s.metric) == (case, engine, metric)}

    def rows(self, metric: str | None = None) -> list[tuple[Case, str]]:
        """(case, engine), cases in the order in which they came, engines as they were loaded; of all metrics if none is named."""
        cases = list(dict.fromkeys(sample.case for sample in self.samples))
        engines = list(dict.fromkeys((*self.engines, *(sample.engine for sample in self.samples))))
        found = {(s.case, s.engine) for s in self.samples if metric in (None, s.metric)}
        return sorted(found, key=lambda pair: (cases.index(pair[0]), engines.index(pair[1])))

    def present_bases(self) -> list[str]:
        return [base for base in self.bases if any(s.engine == base for s in self.samples)]

    def markdown(self, watched: dict[str, float]) -> str:
        """Everything for a reader."""
        parts = [f"## {self.name.replace('_', ' ')}", machine.describe()]
        parts.append(f"CPU pressure {watched['pressure_before']:.0f} % before, {watched['pressure_after']:.0f} % after;"
                     f" processes of others used {watched['others_cores']:.2f} cores meanwhile")
        parts += [self._wide_table()] if self.wide else [self._table(metric) for metric in self.metrics if self.rows(metric.name)]
        parts += self.sections
        if self.missing:
            parts.append("Not run:\n" + "\n".join(f"- {name}: {reason}" for name, reason in self.missing.items()))
        if self.notes:
            parts.append("\n".join(f"- {text}" for text in self.notes))
        return "\n\n".join(parts)

    def _table(self, metric: Metric) -> str:
        bases = self.present_bases()
        lines = [header(self.case_name, "engine", f"{metric.title} (median)", "all rounds", *(f"× {base}" for base in bases))]
        for case, engine in self.rows(metric.name):
            values = self.values(case, engine, metric.name)
            ratios = [self.ratio(case, engine, base, metric) for base in bases]
            lines.append(row(case, engine, number(statistics.median(values), metric.digits),
                             ", ".join(number(value, metric.digits) for value in values),
                             *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)))
        return f"### {metric.title}\n\n" + "\n".join(lines)

    def _wide_table(self) -> str:
        lines = [header(self.case_name, "engine", *(metric.title for metric in self.metrics))]
        for case, engine in self.rows():
            cells = [self.values(case, engine, metric.name) for metric in self.metrics]
            if not any(cells):
                continue             # measured something that is told elsewhere
            lines.append(row(case, engine, *(number(statistics.median(values), metric.digits) if values else ""
                                             for metric, values in zip(self.metrics, cells))))
        return "\n\n".join(["\n".join(lines), *(table for base in self.present_bases() if (table := self._wide_ratios(base)))])

    def _wide_ratios(self, base: str) -> str:
        """How many times better than ``base``, a column for each metric; nothing where there is nobody else."""
        lines = [header(self.case_name, f"× {base}", *(metric.name for metric in self.metrics))]
        for case, engine in self.rows():
            ratios = [self.ratio(case, engine, base, metric) for metric in self.metrics]
            if any(ratios):
                lines.append(row(case, engine, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)))
        return "\n".join(lines) if len(lines) > 1 else ""


def header(*cells: object) -> str:
    return row(*cells) + "\n|" + "---|" * len(cells)


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def progress(text: str) -> None:
    """What is going on, on stderr: stdout holds the tables."""
    print(re.sub(r"\s+", " ", text), file=sys.stderr, flush=True)
