"""`hvdvae reconstruct DIR`: images of a split, each row above the row of its reconstructions."""

from pathlib import Path

import torch

from hvdvae.cli import assemble
from hvdvae.cli.links import refuse_links
from hvdvae.cli.options import ReconstructOptions
from hvdvae.cli.picture_or_array import check_suffix, write_result
from hvdvae.cli.saved_run import open_run
from hvdvae.data import evaluation_batch, input_limits
from hvdvae.vae.generate import reconstruct as reconstructions_of
from hvdvae.vae.pictures import legend, pair_grid, shades_of
from hvdvae.world import World


def reconstruct(options: ReconstructOptions) -> int:
    """Encode, decode, and write a PNG or an array. Under a launcher rank 0 does it. Returns the exit status."""
    check_suffix(options.output)
    world = World.create(deadline=options.deadline)
    run = open_run(options.folder, options.checkpoint, world, data=options.data)
    if world.is_first:
        split, source = run.scored(options.split)
        count = min(options.count, len(source))
        binarization = assemble.binarization(run.config, source)
        originals = evaluation_batch(source, 0, count, binarization=binarization, device=world.device)
        generator = torch.Generator(world.device).manual_seed(0)
        path = Path(options.output or Path(options.folder) / "reconstructions.png")
        if options.output is None:
            refuse_links(Path(options.folder), [path.name])
        shades = shades_of(*input_limits(source))
        means = reconstructions_of(run.model, originals, generator)
        what = f"reconstructions of {split} of {run.dataset.name}, means of p(x|z)"
        print(write_result(path, means, lambda: pair_grid(originals, means, shades=shades), what=what))
        if path.suffix.lower() == ".png" and legend(shades):
            print(f"  {legend(shades)}")
    world.close()
    return 0
