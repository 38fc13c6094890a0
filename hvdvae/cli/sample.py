"""`hvdvae sample DIR`: images from a trained model's prior."""

from pathlib import Path

import torch

from hvdvae.cli.links import refuse_links
from hvdvae.cli.options import SampleOptions
from hvdvae.cli.saved_run import open_model
from hvdvae.vae.generate import sample_images
from hvdvae.vae.pictures import legend, save_grid, shades_of
from hvdvae.world import World


def sample(options: SampleOptions) -> int:
    """Draw and write a PNG, without the data. Under a launcher rank 0 does it. Returns the exit status."""
    world = World.create(deadline=options.deadline)
    saved = open_model(options.folder, options.checkpoint, world)
    if world.is_first:
        generator = torch.Generator(world.device).manual_seed(options.seed)
        path = Path(options.output or Path(options.folder) / "samples.png")
        if options.output is None:
            refuse_links(Path(options.folder), [path.name])
        shades = shades_of(*saved.limits)
        save_grid(path, sample_images(saved.model, options.count, generator), shades=shades)
        print(path)
        if legend(shades):
            print(f"  {legend(shades)}")
    world.close()
    return 0
