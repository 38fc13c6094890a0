"""What a run tells: lines in a log, JSON lines, TensorBoard."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hvdvae.monitor import Monitor, jsonl, progress, tensorboard
from hvdvae.monitor.jsonl import JsonLines
from hvdvae.monitor.progress import Progress
from hvdvae.monitor.tensorboard import TensorBoard
from hvdvae.pulse import Beat


def beat(rate: float = 20.0, distortion: float = 75.5, signal: int = 0) -> Beat:
    return Beat(
        signal=signal,
        examples=5120,
        finite_examples=5120,
        loss=95.5,
        rate=rate,
        distortion=distortion,
        seconds=2.0,
        data_share=0.125,
        exchange_share=0.25,
        step_seconds=[0.01, 0.03],
    )


METRICS = {
    "loss": 96.0,
    "elbo": -96.0,
    "validation_elbo": -97.25,
    "validation_loss": 97.25,
    "examples_per_second": 2560.0,
}


def tell(monitor: Monitor, first: int = 0) -> None:
    for step in range(first, first + 3):
        monitor.on_beat(beat(), step=step, epoch=step / 2, lr=1e-3)
    monitor.on_epoch(1, first + 3, METRICS)
    monitor.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    told = Progress(epochs=4, stream=stream)
    for step in range(1, 101):
        clock[0] += 0.25
        told.on_beat(beat(), step=step, epoch=step / 50, lr=1e-3)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2, "25 seconds, a line every ten"
    assert lines[0] == "epoch 0.80/4  2,560 examples/s  ELBO -95.50  lr 0.001  0:40 left"
    assert "0:30 left" in lines[1]
    assert "\r" not in stream.getvalue()
    told.on_epoch(1, 50, METRICS)
    said = stream.getvalue().splitlines()[-1]
    assert said == "epoch 1/4  elbo -96.00  validation elbo -97.25  examples per second 2,560.00"
    told.close()


def test_a_model_without_rate_shows_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    stream = io.StringIO()
    told = Progress(epochs=4, stream=stream)
    told.on_beat(beat(0.0, 0.0), step=1, epoch=0.1, lr=1e-3)
    told.on_epoch(1, 50, {"loss": 0.5, "validation_loss": 0.625})
    first, second = stream.getvalue().splitlines()
    assert "loss 95.5" in first
    assert "ELBO" not in first
    assert second == "epoch 1/4  loss 0.50  validation loss 0.62"


def test_the_time_left_of_a_resumed_run_counts_its_own_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    told = Progress(epochs=4, done=3.0, stream=stream)
    clock[0] = 20.0
    # The earlier run took other steps, at another world size: their count says nothing.
    told.on_beat(beat(), step=1600, epoch=3.25, lr=1e-3)
    assert "1:00 left" in stream.getvalue(), "0.75 epochs of 80 s"
    clock[0] = 100.0
    told.on_beat(beat(), step=1680, epoch=4.0, lr=1e-3)
    assert "0:00 left" in stream.getvalue()


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = Terminal()
    told = Progress(epochs=2, stream=stream)
    for step in (1, 2, 3):
        told.on_beat(beat(), step=step, epoch=step / 2, lr=1e-3)
    told.on_epoch(1, 2, METRICS)
    told.close()
    assert "%" in stream.getvalue()
    assert "epoch 1/2  elbo -96.00" in stream.getvalue()


def test_the_bar_of_a_resumed_run_starts_where_the_epochs_stand() -> None:
    stream = Terminal()
    told = Progress(epochs=4, done=2.0, stream=stream)
    told.on_beat(beat(), step=900, epoch=3.0, lr=1e-3)
    told.close()
    shares = re.findall(r"(\d+)%", stream.getvalue())
    assert (shares[0], shares[-1]) == ("50", "75")


def test_json_lines_parse_and_a_resumed_run_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "SECONDS_BETWEEN_LINES", 0)
    path = tmp_path / "metrics.jsonl"
    tell(JsonLines(path))
    tell(JsonLines(path), first=3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        *(("step", step) for step in (0, 1, 2)),
        ("epoch", 3),
        *(("step", step) for step in (3, 4, 5)),
        ("epoch", 6),
    ]
    first, fourth = lines[0], lines[3]
    assert first["examples_per_second"] == 2560
    assert (first["rate"], first["distortion"], first["lr"], first["step_seconds"]) == (20, 75.5, 1e-3, [0.01, 0.03])
    assert (first["data_share"], first["exchange_share"]) == (0.125, 0.25)
    assert fourth.items() >= {"epoch": 1, **METRICS}.items()


def test_json_lines_forget_the_steps_that_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the checkpoint that a killed run goes on from."""
    monkeypatch.setattr(jsonl, "SECONDS_BETWEEN_LINES", 0)
    path = tmp_path / "metrics.jsonl"
    tell(JsonLines(path))
    tell(JsonLines(path), first=3)
    with path.open("a") as file:
        file.write('{"torn')
    tell(JsonLines(path, first_step=4), first=5)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if line != '{"torn'] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert lines.count('{"torn') == 1
    tell(JsonLines(path, first_step=0))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines() if "torn" not in line] == [0, 0, 1, 2, 3]


def test_json_lines_are_whole_while_the_run_goes_on_and_not_too_many(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    told = JsonLines(path)
    for step in range(50):
        told.on_beat(beat(), step=step, epoch=0.1, lr=1e-3)
    assert path.read_text().endswith("}\n"), "flushed, for a run that is killed"
    assert len(path.read_text().splitlines()) == 1
    told.close()


def test_json_lines_go_on_after_one_that_a_crash_tore(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "epoch", "epoch": 1}\n{"kind": "ep')
    lines = JsonLines(path)
    lines.on_epoch(2, 20, {"loss": 1.0})
    lines.close()
    assert json.loads(path.read_text().splitlines()[-1])["epoch"] == 2


def test_json_lines_have_no_nan(tmp_path: Path) -> None:
    """JSON has none: other languages refuse the whole line."""
    path = tmp_path / "metrics.jsonl"
    told = JsonLines(path)
    told.on_epoch(1, 3, {"gradient_norm": float("inf"), "validation_loss": float("nan"), "loss": 1.5})
    told.close()

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert (record["gradient_norm"], record["validation_loss"], record["loss"]) == (None, None, 1.5)


def test_tensorboard_has_the_curves_the_split_of_time_and_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(tensorboard, "SECONDS_BETWEEN_POINTS", 0)
    board = TensorBoard(tmp_path)
    import numpy as np

    board.images("samples", np.zeros((4, 6, 3), np.uint8), 2)
    tell(board)
    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    scalars = set(found.Tags()["scalars"])
    assert scalars >= {
        "train/loss",
        "train/rate",
        "train/distortion",
        "train/learning_rate",
        "speed/examples_per_second",
        "time/data",
        "time/compute",
        "time/communication",
        "step_seconds/rank_0",
        "step_seconds/rank_1",
        "epoch/elbo",
        "epoch/validation_elbo",
    }
    assert found.Tags()["images"] == ["samples"]
    value: Callable[[str], list[float]] = lambda tag: [point.value for point in found.Scalars(tag)]  # noqa: E731
    assert value("time/compute") == [0.625] * 3
    assert value("speed/examples_per_second") == [2560] * 3
    assert [point.step for point in found.Scalars("train/loss")] == [0, 1, 2]
    assert value("epoch/validation_elbo") == [-97.25]
