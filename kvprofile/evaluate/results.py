"""The files of an evaluation: JSON with everything, Markdown to read, plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvprofile.evaluate.figures import grid_figure, quality_figure, save
from kvprofile.evaluate.rows import Row
from kvprofile.evaluate.summary import by_group, summarise
from kvprofile.evaluate.tables import markdown
from kvprofile.files import atomic_write


def results_of(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """The result as JSON values: the circumstances, a summary by method, means by group, and every single row."""
    return {
        "facts": facts,
        "methods": summarise(rows),
        "groups": by_group(rows),
        "rows": [{name: value for name, value in asdict(row).items() if name != "key"} for row in rows],
    }


def write_results(results: dict[str, Any], rows: Sequence[Row], output: Path, judged: Sequence[str]) -> list[Path]:
    """Write `output` and, beside it, `.md`, `.png` and a grid for every task that has one; returns the paths."""
    atomic_write(output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    text = output.with_suffix(".md")
    atomic_write(text, markdown(results["facts"], results["methods"], results["groups"]))
    paths = [output, text, save(quality_figure(results["methods"], judged), output.with_suffix(".png"))]
    for bench in dict.fromkeys(row.bench for row in rows if row.place is not None):
        figure = grid_figure([row for row in rows if row.bench == bench], bench)
        paths.append(save(figure, output.with_name(f"{output.stem}-{bench}.png")))
    return paths
