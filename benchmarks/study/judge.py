"""What each kept model of a cell is worth: python -m benchmarks.study.judge FOLDER, in one process, after the run.

Reads order.json and track.npz (job.py), writes curve.json. All models see the same binarized validation images and the
same noise, so that differences are theirs.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.study.loop import load_state
from benchmarks.study.own_model import model_of
from hvdvae.cli import assemble
from hvdvae.config import TrainConfig
from hvdvae.data import evaluation_batch, open_dataset
from hvdvae.vae.evaluate import evaluate


def main(folder: Path) -> None:
    """Judge. Blocks."""
    order = json.loads((folder / "order.json").read_text())
    config = TrainConfig(**order["config"])
    validation = open_dataset(order["data"], validation=config.validation).validation
    model = model_of(order["build"], config, validation.shape, torch.device("cpu"))
    track = np.load(folder / "track.npz")

    def gather(start: int, stop: int) -> Tensor:
        return evaluation_batch(validation, start, stop, binarization=assemble.binarization(config, validation))

    samples = order["nll_samples"] if order["bound"] == "nll" else 1
    points = []
    for examples, seconds, weights in zip(track["examples"], track["seconds"], track["weights"], strict=True):
        load_state(model, weights)
        with torch.no_grad():
            found = evaluate(model, gather, len(validation), samples=samples)
        point = {"examples": int(examples), "seconds": float(seconds), "elbo": _finite(found.elbo)}
        points.append(point | ({"nll": _finite(found.nll)} if order["bound"] == "nll" else {}))
    best = max(range(len(points)), key=lambda place: points[place]["elbo"] or -math.inf)
    load_state(model, track["weights"][best])
    with torch.no_grad():
        nll = evaluate(model, gather, len(validation), samples=order["nll_samples"]).nll
    curve = {"points": points, "nll": _finite(nll), "nll_samples": order["nll_samples"]}
    (folder / "curve.json").write_text(json.dumps(curve))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
