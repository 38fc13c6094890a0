"""`hvdvae sample DIR`: examples from a trained model's prior."""

from pathlib import Path

import torch

from hvdvae.cli import out_of_memory
from hvdvae.cli.links import refuse_links
from hvdvae.cli.options import SampleOptions
from hvdvae.cli.picture_or_array import check_suffix, write_result
from hvdvae.cli.saved_run import open_model
from hvdvae.vae.generate import draw_images, sample_images
from hvdvae.vae.pictures import image_grid, legend, shades_of
from hvdvae.world import World


def sample(options: SampleOptions) -> int:
    """Draw, and write a PNG or an array, without the data. Under a launcher rank 0 does it. Returns the exit status."""
    check_suffix(options.output)
    world = World.create(deadline=options.deadline)
    saved = open_model(options.folder, options.checkpoint, world)
    if world.is_first:
        generator = torch.Generator(world.device).manual_seed(options.seed)
        path = Path(options.output or Path(options.folder) / "samples.png")
        if options.output is None:
            refuse_links(Path(options.folder), [path.name])
        shades, means = shades_of(*saved.limits), options.values == "means"
        with out_of_memory.named(f"--count {options.count}"):
            drawn = (sample_images if means else draw_images)(saved.model, options.count, generator)
        what = f"{'means' if means else 'draws'} of p(x|z) for z from the prior"
        with out_of_memory.named(f"--count {options.count}"):
            print(write_result(path, drawn, lambda: image_grid(drawn, shades=shades), what=what))
        if path.suffix.lower() == ".png" and legend(shades):
            print(f"  {legend(shades)}")
    world.close()
    return 0
