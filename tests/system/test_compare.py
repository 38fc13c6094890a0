"""The harness: real studies on digits, killed and continued, with cells that fail; its report in a real browser."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from tests.system.conftest import ROOT, Launch, clean_environment
from tests.system.worker_jobs import has_ulfm

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
TWO_MINUTES = ROOT / "benchmarks" / "studies" / "two-minutes.yaml"

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


def study(contenders: str, scenarios: str = "  uniform:", epochs: int = 4, seconds: int = 60) -> str:
    return f"""\
title: A test
data: digits
train: {{model: mlp, batch_size: 40, lr: 1e-3}}
world_sizes: [2]
seeds: [0]
target: {{nats: -30}}
budget: {{epochs: {epochs}, seconds: {seconds}}}
nll_samples: 2
contenders:
{contenders}
scenarios:
{scenarios}
"""


OURS = "  allreduce: {strategy: allreduce, engine: mpi}\n  asp: {strategy: ps}"


def start(folder: Path, path: Path, *arguments: str) -> Launch:
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), str(path), "--output", "out", *arguments]
    return Launch(command, clean_environment(), folder)


def compare(folder: Path, text: str, *arguments: str) -> tuple[int, str]:
    path = folder / "study.yaml"
    path.write_text(text)
    ended = start(folder, path, *arguments).finish(200)
    return ended.status, ended.output


def cells_in(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out" / "cells").glob("*.json")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the two-minute study."""
    folder = tmp_path_factory.mktemp("two-minutes")
    ended = start(folder, TWO_MINUTES).finish(200)
    assert ended.status == 0, ended.output
    assert "nothing is claimed" in ended.output, "one seed is no evidence"
    return folder / "out"


@pytest.fixture(scope="module")
def page(measured: Path) -> Iterator[Any]:
    """The report in a headless browser without a network; yields the page and what the browser complained of."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1200, "height": 1600}, offline=True)
        complaints: list[str] = []
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("requestfailed", lambda request: complaints.append(request.url))
        opened.goto((measured / "report.html").as_uri())
        yield opened, complaints
        browser.close()


def test_cells_hold_what_was_measured(measured: Path) -> None:
    cells = {path.stem: json.loads(path.read_text()) for path in (measured / "cells").glob("*.json")}
    assert set(cells) == {"uniform.np2.allreduce.seed0", "uniform.np2.asp.seed0"}
    for cell in cells.values():
        assert cell["failed"] is None, cell["log"]
        elbos = [point["elbo"] for point in cell["points"]]
        assert elbos[-1] > elbos[0] + 5, "it has learned"
        assert [point["seconds"] for point in cell["points"]] == sorted(point["seconds"] for point in cell["points"])
        assert cell["points"][-1]["examples"] >= 10 * cell["epoch_examples"] > 0
        assert -cell["nll"] >= max(elbos) - 0.5, "the importance-weighted bound is tighter than the ELBO"
        assert cell["latency_seconds"]["p50"] <= cell["latency_seconds"]["p95"] <= cell["latency_seconds"]["p99"]
        for shares in cell["split"]:
            assert sum(shares.values()) == pytest.approx(1, abs=0.05)
    first = [cell["points"][0]["elbo"] for cell in cells.values()]
    assert first[0] == pytest.approx(first[1]), "all begin with the same weights"
    asp = cells["uniform.np2.asp.seed0"]
    assert sum(asp["staleness"].values()) == sum(asp["steps"])
    assert set(cells["uniform.np2.allreduce.seed0"]["staleness"]) == {"0"}


def test_pictures_and_table_lie_beside_the_page(measured: Path) -> None:
    assert len((measured / "cells.csv").read_text().splitlines()) == 1 + 2
    pictures = list((measured / "pictures").glob("*.png"))
    assert len(pictures) >= 5
    for path in pictures:
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 20, f"{path.name} is blank"


def test_the_page_opens_offline_and_nothing_complains(page: Any, tmp_path: Path) -> None:
    opened, complaints = page
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert len(np.unique(pixels)) > 50
    assert (pixels < 128).mean() > 0.005, "there is ink on it"
    assert complaints == []
    assert opened.locator("#answers dd").count() == 1
    assert opened.locator("figure svg").count() >= 5
    assert "2 ranks" in opened.locator("#answers").inner_text()


def test_the_tables_fit_the_page(page: Any) -> None:
    opened, _ = page
    widths = opened.locator(".wide").evaluate_all("all => all.map(one => [one.scrollWidth, one.clientWidth])")
    assert len(widths) >= 4
    assert all(needed <= there for needed, there in widths), widths


def test_without_matplotlib_the_report_says_what_to_install(measured: Path, tmp_path: Path) -> None:
    """As after launch/demo.sh, which installs what a run needs alone."""
    hidden = tmp_path / "hidden" / "matplotlib"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'matplotlib'\")\n")
    shutil.copytree(measured, tmp_path / "out")
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), str(TWO_MINUTES), "--output", "out"]
    environment = {**clean_environment(), "PYTHONPATH": os.pathsep.join([str(hidden.parent), str(ROOT)])}
    ended = Launch([*command, "--report-only"], environment, tmp_path).finish(100)
    assert ended.status == 0, ended.output
    assert "without pictures: matplotlib is not installed" in ended.output
    assert "pip install matplotlib" in (tmp_path / "out" / "report.html").read_text()


def test_the_table_can_be_sorted(page: Any) -> None:
    opened, complaints = page
    table = opened.locator("table.sortable").first

    def names() -> list[str]:
        return [str(text) for text in table.locator("tbody td:first-child").all_inner_texts()]

    head = table.get_by_role("button", name="contender")
    head.click()
    assert names() == ["allreduce", "asp"]
    head.click()
    assert names() == ["asp", "allreduce"]
    table = opened.locator("table.sortable").nth(1)
    head = table.get_by_role("button", name="examples/s")
    head.click()
    rates = [
        float(key)
        for key in table.locator("tbody tr").evaluate_all("rows => rows.map(row => row.cells[1].dataset.key)")
    ]
    assert rates == sorted(rates)
    assert complaints == []


def test_a_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    """SIGKILL: nobody can clean up but the kernel; the ranks must not stay."""
    path = tmp_path / "study.yaml"
    path.write_text(study(OURS, epochs=400, seconds=5))
    harness = start(tmp_path, path)
    family = await_second_cell(harness, tmp_path)
    os.kill(harness.process.pid, signal.SIGKILL)
    harness.process.communicate()
    gone, alive = psutil.wait_procs(family, 20)
    assert not alive, alive
    assert len(gone) >= 3
    before = cells_in(tmp_path)
    assert len(before) == 1
    (finished,) = before
    ended = start(tmp_path, path).finish(200)
    assert ended.status == 0, ended.output
    assert "1 of 2 cells are there already" in ended.output
    after = cells_in(tmp_path)
    assert len(after) == 2
    assert after[finished] == before[finished], "it was not measured again"


def await_second_cell(harness: Launch, folder: Path) -> list[psutil.Process]:
    """What runs, once the first cell is kept and the ranks of the second train."""
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up:
        assert harness.process.poll() is None, "it ended too early"
        family = psutil.Process(harness.process.pid).children(recursive=True)
        ranks = [process for process in family if "benchmarks.study.job" in " ".join(_command(process))]
        if len(cells_in(folder)) == 1 and len(ranks) >= 3:
            return family
        time.sleep(0.05)
    raise AssertionError("the second cell did not start")


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_two_studies_do_not_measure_each_other(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(study(OURS, epochs=400))
    first = start(tmp_path, path)
    try:
        give_up = time.monotonic() + 60
        while not (tmp_path / "out" / "logs").exists():
            assert time.monotonic() < give_up
            time.sleep(0.05)
        time.sleep(1.0)
        second = subprocess.run(
            [*map(str, first.process.args[:-1]), "other"],  # type: ignore[union-attr, index]
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    finally:
        first.kill()
    assert second.returncode == 2
    assert "another study is running" in second.stderr


def test_a_cell_that_fails_is_shown_with_its_log(tmp_path: Path) -> None:
    text = study(OURS, "  killed: {kill: {rank: 1, at_step: 10}}")
    status, output = compare(tmp_path, text)
    assert status == 0, output
    cells = cells_in(tmp_path)
    dead = cells["killed.np2.allreduce.seed0"]
    assert "ended with" in dead["failed"]
    assert dead["log"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "killed.np2.allreduce.seed0: ended with" in html
    assert "Failed: allreduce" in output
    if has_ulfm():
        survivor = cells["killed.np2.asp.seed0"]
        assert survivor["failed"] is None, survivor["log"]
        assert len(survivor["steps"]) == 1, "of two workers one was left"
    status, output = compare(tmp_path, text, "--report-only")
    assert status == 0
    assert "2 of 2 cells" in output


def test_trouble_does_what_it_says(tmp_path: Path) -> None:
    scenarios = """\
  uniform:
  slow: {slow: {rank: 1, factor: 4}}
  asleep: {slow: {rank: 1, factor: 4, by: sleep}}
  stops: {stop: {rank: 1, seconds: 3, at_step: 10}}
  unequal: {shares: [4, 1]}"""
    status, output = compare(tmp_path, study("  allreduce: {strategy: allreduce, engine: mpi}", scenarios, epochs=6))
    assert status == 0, output
    cells = {cell["scenario"]: cell for cell in cells_in(tmp_path).values()}
    assert all(cell["failed"] is None for cell in cells.values())

    def elbos(name: str) -> list[float]:
        return [point["elbo"] for point in cells[name]["points"]]

    for name in ("slow", "asleep", "stops"):
        assert elbos(name) == pytest.approx(elbos("uniform"), abs=1e-3), "trouble costs time and changes no number"
    assert elbos("unequal") != pytest.approx(elbos("uniform"), abs=1e-3)
    for name in ("slow", "asleep"):
        waits = [shares["wait"] for shares in cells[name]["split"]]
        assert waits[0] > 2 * waits[1], "the other rank waits"
    assert cells["stops"]["points"][-1]["seconds"] > 3


def test_a_slow_link_is_slow_and_counted(tmp_path: Path) -> None:
    contenders = "  allreduce: {strategy: allreduce, engine: mpi}\n  ddp: {peer: ddp}"
    status, output = compare(tmp_path, study(contenders, "  link: {link_mbit: 100}", epochs=1))
    assert status == 0, output
    for cell in cells_in(tmp_path).values():
        if cell["failed"] is not None and cell["failed"].startswith("skipped"):
            pytest.skip(cell["failed"])
        assert cell["failed"] is None, cell["log"]
        # A ring sends what the gradient has in bytes, two ranks each; 100 Mbit/s are 12.5 MB/s.
        payload = cell["payload_bytes_per_step"]
        assert cell["sent_bytes_per_step"] == pytest.approx(payload, rel=0.25)
        assert cell["latency_seconds"]["p50"] > 0.8 * payload / 12.5e6


def test_parts_of_a_study_make_the_whole(tmp_path: Path) -> None:
    text = study(OURS, "  uniform:", epochs=1)
    for part in ("1/2", "2/2"):
        status, output = compare(tmp_path, text, "--part", part)
        assert status == 0, output
        assert f"part {part} is done" in output
        assert not (tmp_path / "out" / "report.html").exists()
    status, output = compare(tmp_path, text, "--report-only")
    assert status == 0, output
    assert "2 of 2 cells" in output
    assert (tmp_path / "out" / "report.html").exists()
    status, output = compare(tmp_path, text, "--part", "3/2")
    assert status == 2
    assert "--part" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("factor: 3", "factr: 3"),
            "study.yaml, line 13: scenarios.slow.slow.factr: unknown key; did you mean factor?",
        ),
        (("data: digits", "data: /no/such/place"), "/no/such/place"),
        (("title: A test", "title: ["), "study.yaml, line"),
    ],
)
def test_a_bad_study_ends_at_once(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = study(OURS, "  slow: {slow: {rank: 1, factor: 3}}").replace(*change)
    status, output = compare(tmp_path, text)
    assert status == 2
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "out" / "cells").exists()


def test_report_only_needs_something_to_report(tmp_path: Path) -> None:
    status, output = compare(tmp_path, study(OURS), "--report-only")
    assert status == 2
    assert "has no results of this study" in output


def test_scaling_tells_throughput_and_efficiency(tmp_path: Path) -> None:
    words = ["--sizes", "1", "--seeds", "0", "--epochs", "2", "--batch-size", "40", "--contenders", "sharded"]
    words += ["--output", "out"]
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), *words]
    ended = Launch(command, clean_environment(), tmp_path).finish(250)
    assert ended.status == 0, ended.output
    for mode in ("strong", "weak"):
        assert f"{mode} scaling, batch 40" in ended.output
        cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / mode / "cells").glob("*.json")]
        assert {cell["contender"] for cell in cells} == {"one-process", "allreduce", "sharded"}
        assert [cell["name"] for cell in cells if cell["failed"]] == []
        assert (tmp_path / "out" / mode / "report.html").exists()
    rows = [line.split() for line in ended.output.splitlines() if line.startswith("one-process")]
    assert len(rows) == 2
    assert all(row[1] == "1" and int(row[2]) > 0 for row in rows)


def test_scaling_refuses_what_is_no_size(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--sizes", "none", "--output", "out"]
    ended = Launch(command, clean_environment(), tmp_path).finish(60)
    assert ended.status == 2
    assert "world_sizes" in ended.output
    assert "Traceback" not in ended.output


def test_a_model_of_ones_own_takes_part(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from hvdvae.vae import build_model\n"
        "def build(shape): return build_model('mlp', shape, hidden=[7], latent=[2], activation='relu')\n"
    )
    text = study("  allreduce: {strategy: allreduce, engine: mpi}\n  ddp: {peer: ddp}", epochs=2)
    status, output = compare(tmp_path, text.replace("model: mlp", "model: mine:build"))
    assert status == 0, output
    found = cells_in(tmp_path)
    assert len(found) == 2
    for cell in found.values():
        assert cell["failed"] is None, cell["log"]
        assert cell["points"][-1]["elbo"] > cell["points"][0]["elbo"] + 1
    status, output = compare(tmp_path, text.replace("model: mlp", "model: mine:nothing"))
    assert status == 2
    assert "compare: model mine:nothing" in output
