"""The report of a study: one HTML file that needs nothing else; pictures and a CSV of all cells beside it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.study.cells import cells as all_cells
from benchmarks.study.findings import LEAST_SEEDS, Cells, Condition, conditions, sentence
from benchmarks.study.gallery import Gallery, gallery_in
from benchmarks.study.loop import WARM_UP_PASSES
from benchmarks.study.numbers import FIRST_STEPS
from benchmarks.study.study_file import Scenario, Study
from benchmarks.study.table import HEADS, lines, parts, write_csv
from benchmarks.study.words import of_contender, of_scenario
from hvdvae.whole_file import write_whole

TEMPLATE = "page.html.jinja"


def write_page(study: Study, text: str, cells: Cells, folder: Path, command: str) -> Path:
    """Write report.html, pictures/ and cells.csv. `text`: the study's file; returns the page's path."""
    found = conditions(study, cells)
    gallery, no_pictures = gallery_in(folder / "pictures", list(study.contenders))
    cores = max((cell["machine"]["hardware"]["cores"] for cell in cells), default=0)
    page = _template().render(
        study=study,
        text=text,
        command=command,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cells=cells,
        count=f"{len(cells)} of {len(all_cells(study))} cells",
        failed=[cell for cell in cells if cell["failed"]],
        machines=_machines(cells),
        first_steps=FIRST_STEPS,
        warm_up=WARM_UP_PASSES,
        least_seeds=LEAST_SEEDS,
        cores=cores,
        no_pictures=no_pictures,
        heads=HEADS,
        parts=parts(),
        contenders=[(one.name, of_contender(one)) for one in study.contenders.values()],
        sections=[_section(condition, study.scenarios[condition.scenario], gallery, cores) for condition in found],
        scaling=_scaling(study, found, gallery, cores),
    )
    write_csv(
        folder / "cells.csv",
        cells,
        {(condition.scenario, condition.size): condition.target for condition in found},
        study,
    )
    path = folder / "report.html"
    write_whole(path, page)
    return path


def _section(condition: Condition, scenario: Scenario, gallery: Gallery, cores: int) -> dict[str, Any]:
    name = f"{condition.scenario}-np{condition.size}"
    return {
        "id": name,
        "condition": condition,
        "title": of_scenario(scenario),
        "oversubscribed": condition.size > cores,
        "sentence": sentence(condition),
        "lines": lines(condition),
        "pictures": {
            "Validation bound over time": gallery.curves(f"{name}-time", condition, "seconds"),
            "Validation bound over examples": gallery.curves(f"{name}-examples", condition, "examples"),
            "Time to the target": gallery.times(f"{name}-target", condition),
            "Where the time of each rank went": gallery.split(f"{name}-split", condition),
            "Staleness": gallery.staleness(f"{name}-staleness", condition),
        },
    }


def _scaling(study: Study, found: list[Condition], gallery: Gallery, cores: int) -> dict[str, str]:
    """A picture a scenario, where there is more than one size to draw."""
    drawn = {}
    for name, scenario in study.scenarios.items():
        mine = [condition for condition in found if condition.scenario == name]
        sizes = {cell["size"] for condition in mine for row in condition.rows for cell in row.cells}
        if len(sizes) > 1:
            drawn[of_scenario(scenario)] = gallery.scaling(f"{name}-scaling", name, mine, cores)
    return drawn


def _machines(cells: Cells) -> list[dict[str, Any]]:
    """Each that cells were measured on, once: hardware, versions, and first and last date."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        machine = cell["machine"]
        hardware = {key: value for key, value in machine["hardware"].items() if key != "load_average_at_start"}
        entry = found.setdefault(
            repr((hardware, machine["versions"])), {"hardware": hardware, "versions": machine["versions"], "dates": []}
        )
        entry["dates"].append(machine["date"])
    return [{**entry, "dates": (min(entry["dates"]), max(entry["dates"]))} for entry in found.values()]


def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(TEMPLATE)
