"""`hvdvae evaluate DIR`: the likelihood of a trained model, over all ranks."""

import math
import os
import time
from pathlib import Path

import torch

from hvdvae.cli import assemble
from hvdvae.cli.assessment import assess
from hvdvae.cli.learning import complaint
from hvdvae.cli.options import EvaluateOptions
from hvdvae.cli.placement import check_slurm
from hvdvae.cli.results import versions, write_json
from hvdvae.cli.saved_run import open_run
from hvdvae.cores import threads_of_rank
from hvdvae.errors import NonFiniteError
from hvdvae.launcher import detect
from hvdvae.world import World
from hvdvae.world.settings import without_ports


def evaluate(options: EvaluateOptions) -> int:
    """Evaluate, print, and write DIR/evaluation.json. Blocks; every rank must call it. Returns the exit status."""
    idle = check_slurm(os.environ, detect(os.environ), None)
    without_ports(os.environ)
    world = World.create(device=options.device, deadline=options.deadline)
    fair = threads_of_rank(world)
    torch.set_num_threads(options.threads or fair)
    run = open_run(options.folder, options.checkpoint, world, data=options.data)
    split, source = run.scored(options.split)
    started = time.perf_counter()
    found = assess(
        run.model,
        source,
        world,
        binarization=assemble.binarization(run.config, run.dataset.train),
        samples=options.samples,
        seed=options.seed,
        title=f"{split} NLL, k={options.samples}",
    )
    layers = [
        {"active_units": active, "kl_per_dimension": kl.tolist(), "variance_of_means": variance.tolist()}
        for active, kl, variance in zip(found.active_units, found.kl_per_dimension, found.mean_variance, strict=True)
    ]
    if world.is_first:
        if idle:
            print(f"hvdvae: warning: {idle}")
        record = {
            "checkpoint": run.checkpoint,
            "data": run.dataset.name,
            "split": split,
            "examples": len(found.nll_per_example),
            "nll": found.nll,
            "nll_standard_error": found.nll_error,
            "nll_samples": options.samples,
            "elbo": found.elbo,
            "rate": found.rate,
            "distortion": found.distortion,
            "layers": layers,
            "world_size": world.size,
            "seconds": time.perf_counter() - started,
            "versions": versions(),
        }
        print(f"{split} of {run.dataset.name}, {record['examples']} examples, {run.checkpoint}")
        print(
            f"  NLL         {found.nll:9.3f} +- {found.nll_error:.3f} nats (importance-weighted, k={options.samples})"
        )
        print(f"  ELBO        {found.elbo:9.3f} nats")
        print(f"  rate        {found.rate:9.3f} nats")
        print(f"  distortion  {found.distortion:9.3f} nats")
        for number, layer in enumerate(layers, 1):
            kl = sorted(layer["kl_per_dimension"], reverse=True)
            print(
                f"  layer {number}: {layer['active_units']} of {len(kl)} units active; KL per dimension "
                f"{' '.join(f'{value:.2f}' for value in kl[:10])}{' ...' if len(kl) > 10 else ''}"
            )
        # Last: numbers that took hours are not to be lost to a folder that cannot be written to.
        write_json(Path(options.folder) / "evaluation.json", record)
        print(f"  {Path(options.folder) / 'evaluation.json'}")
    # Other data may be far from what a good model knows: that is what is asked then.
    is_judged = not (run.is_other_data and math.isfinite(found.nll))
    bad = is_judged and complaint(run.config, source, found.nll, what=f"the model of {run.checkpoint}")
    if bad:
        raise NonFiniteError(bad)
    world.close()
    return 0
