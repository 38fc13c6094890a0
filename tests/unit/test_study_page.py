"""The report of a study: pictures for papers, tables that fit, and a page where matplotlib is not installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.study.gallery import NO_PICTURES, gallery_in
from benchmarks.study.page import write_page
from benchmarks.study.run import results_in
from benchmarks.study.study_file import open_study
from benchmarks.study.table import COLUMNS, HEADS, parts

ROOT = Path(__file__).parents[2] / "benchmarks"
RECORDED = ROOT / "results" / "codecs-2026-11-22"


def page_of(folder: Path) -> str:
    study, text = open_study(ROOT / "studies" / "codecs.yaml")
    found = results_in(study, RECORDED)
    assert len(found) == len(list((RECORDED / "cells").glob("*.json")))
    return write_page(study, text, found, folder, "python benchmarks/compare.py").read_text()


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in (ROOT / "results").glob("*/cells")), ids=lambda path: str(path.name)
)
def test_kept_results_answer_the_studies_that_come_along(folder: Path) -> None:
    """However the file of a study is read, and what defaults are called by now."""
    name = folder.name.rpartition("-20")[0]
    study, _ = open_study(ROOT / "studies" / f"{name}.yaml")
    kept = [json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")]
    assert {cell["name"] for cell in results_in(study, folder)} == {cell["name"] for cell in kept}


def test_pictures_come_as_png_svg_and_pdf(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = page_of(tmp_path)
    assert NO_PICTURES not in page
    names = {path.stem for path in (tmp_path / "pictures").iterdir()}
    assert len(names) >= 4
    assert page.count("<svg") == len(names)
    for name in names:
        png, svg, pdf = (tmp_path / "pictures" / f"{name}.{kind}" for kind in ("png", "svg", "pdf"))
        assert len(np.unique(np.asarray(Image.open(png).convert("L")))) > 20
        assert "<text" in svg.read_text(), "letters are letters"
        assert pdf.read_bytes().startswith(b"%PDF-")


def test_without_matplotlib_there_is_a_page_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.study.pictures", raising=False)
    page = page_of(tmp_path)
    assert NO_PICTURES in page
    assert "pip install matplotlib" in page
    assert "<svg" not in page
    assert page.count("<table") > len(parts())
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "cells.csv"}


def test_tables_have_units_in_their_heads_and_leave_nothing_out(tmp_path: Path) -> None:
    placed = [place for _, places in parts() for place in places]
    assert sorted(placed) == [*range(len(HEADS))]
    assert len(HEADS) == 2 + len(COLUMNS) + 1
    assert max(len(places) for _, places in parts()) <= 6, "a page is no wider"
    assert {HEADS[place][1] for place in parts()[0][1]} == {"s", "1000 examples", "nats"}
    page = page_of(tmp_path)
    for words in ('to target <span class="unit">(s)</span>', 'memory <span class="unit">(MB)</span>'):
        assert words in page


def test_a_curve_is_the_median_of_its_seeds_with_a_band_as_far_as_all_got() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.study.pictures import over_seeds

    def seed(*points: tuple[float, float | None]) -> dict[str, object]:
        return {"points": [{"seconds": seconds, "elbo": elbo} for seconds, elbo in points]}

    cells = [
        seed((0, -10), (2, -6), (4, -2)),
        seed((0, -20), (4, -4)),
        seed((1, -30), (2, None), (3, -10), (9, -1)),
        seed((0, None)),
        {"points": []},
    ]
    found = over_seeds(cells, "seconds", "elbo")
    assert found is not None
    places, low, middle, high = (part.tolist() for part in found)
    assert places == [1, 2, 3, 4]
    assert high == [-8, -6, -4, -2]
    assert low == [-30, -20, -10, -8.5]
    assert middle == [-16, -12, -8, -4]
    assert over_seeds(cells[3:], "seconds", "elbo") is None


def test_contenders_differ_in_more_than_color(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.study.pictures import Pictures

    gallery, missing = gallery_in(tmp_path, [f"c{place}" for place in range(8)])
    assert not missing
    assert isinstance(gallery, Pictures)
    for looks in (gallery._dashes, gallery._hatches, gallery._colors):
        assert len({repr(look) for look in looks.values()}) == 8


def test_the_targets_label_is_where_no_curve_can_be(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page_of(tmp_path)
    svg = (tmp_path / "pictures" / "uniform-np2-time.svg").read_text()
    assert ">target</text>" in svg
    import matplotlib.figure
    from matplotlib.axes import Axes

    from benchmarks.study import pictures
    from benchmarks.study.findings import Condition, Row

    drawn: list[Axes] = []
    gallery = pictures.Pictures(tmp_path, ["a"])

    def keep(name: str, draw: object, inches: object) -> str:
        figure = matplotlib.figure.Figure()
        drawn.append(figure.add_subplot())
        draw(drawn[0])  # type: ignore[operator]
        return ""

    gallery._draw = keep  # type: ignore[method-assign, assignment]
    points = [{"seconds": s, "examples": s, "elbo": -10.0 + s} for s in range(5)]
    row = Row("a", [{"points": points}], False, True, [1.0], [1.0])
    gallery.curves("x", Condition("uniform", 2, "elbo", -7.0, [row]), "seconds")
    (label,) = drawn[0].texts
    assert label.get_position()[0] > 1, "right of the axes"
    assert drawn[0].get_legend() is None, "the legend stands below them"
