"""`hvdvae train`: from a configuration to a trained model, its likelihood, pictures and a summary."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hvdvae import checkpoint as checkpoints
from hvdvae.checkpoint import Source
from hvdvae.cli import assemble, leftovers
from hvdvae.cli.agreement import agreed_config, digest
from hvdvae.cli.asked import Asked
from hvdvae.cli.assessment import Pictures, assess, validation_numbers
from hvdvae.cli.config_file import CONFIG_FILE, write_config
from hvdvae.cli.folder_lock import release
from hvdvae.cli.learning import complaint, fits
from hvdvae.cli.narration import closing, opening, say
from hvdvae.cli.placement import announce, check_slurm
from hvdvae.cli.results import keep_speed, prepare_folder, versions, write_json
from hvdvae.cli.same_function import changes, check_resumed
from hvdvae.config import TrainConfig
from hvdvae.cores import threads_of_rank
from hvdvae.data import Dataset, Loader, check_dataset, input_limits, mean_example
from hvdvae.errors import CheckpointError, ConfigError, NonFiniteError
from hvdvae.launcher import detect
from hvdvae.monitor import Monitor
from hvdvae.monitor.jsonl import JsonLines
from hvdvae.monitor.progress import Progress
from hvdvae.monitor.tensorboard import TensorBoard
from hvdvae.outcome import Outcome, exit_status
from hvdvae.parallel.mesh import Groups
from hvdvae.quick_start import spare_the_compiler
from hvdvae.recovery import surviving
from hvdvae.resume import load_weights, part_of
from hvdvae.signals import deaf_to_warnings, termination_interrupts
from hvdvae.strategies import Strategy
from hvdvae.strategies.sync_batch_norm import convert_sync_batch_norm
from hvdvae.trainer import Trainer
from hvdvae.vae import VAE, set_output_bias
from hvdvae.world import World
from hvdvae.world.settings import without_ports

if TYPE_CHECKING:
    from hvdvae.parallel.pipeline import Pipeline


def train(asked: Asked) -> int:
    """Run the whole job. Blocks; every rank must call it. Returns the exit status."""
    try:
        return _train(asked)
    finally:
        release()


def _train(asked: Asked) -> int:
    started = time.time()
    launch = detect(os.environ)
    asked.check(launch)
    check_slurm(os.environ, launch, asked.values["strategy"])
    servers = asked.values["servers"] * (1 + asked.values["replicas"]) if asked.values["strategy"] == "ps" else 0
    if launch.local_rank == 0 and (cleared := leftovers.clear()):
        sys.stderr.write(f"hvdvae: {cleared}\n")
    if not asked.values["replace_workers"]:
        without_ports(os.environ)
    world = World.create(device=asked.values["device"], deadline=asked.values["deadline"], servers=servers)
    world.starting = not world.joins
    config = assemble.resolved(agreed_config(asked, world))
    if not config.compile:
        spare_the_compiler()
    world.watchdog.seconds = config.deadline
    world.members.replaces = config.replace_workers
    if config.replace_workers and world.role == "trainer" and not world.survives_deaths:
        raise ConfigError("--replace-workers: a death ends this job; start it with mpirun --with-ft ulfm (Open MPI 5)")
    fair = threads_of_rank(world)
    threads = config.threads or fair
    if not world.joins:
        announce(world, config.strategy, launch, threads)
    if world.servers:
        plan = assemble.plan(config)
        workers = world.size if world.role == "trainer" else world.everyone.size - world.servers
        plan.check(workers=workers, servers=world.servers)
        if world.role == "server":
            from hvdvae.ps.serve import serve

            serve(world, plan)
            with deaf_to_warnings():
                world.close()
            return 0
    torch.set_num_threads(threads)
    groups = assemble.mesh(config, world)
    replicas = world if groups is None else groups.replicas
    dataset = assemble.data(config.data, world, validation=config.validation, external_storage=config.external_storage)
    binarization = assemble.binarization(config, dataset.train)
    config = replace(config, binarization=binarization)  # What stays as it is where a later launch has other data.
    check_dataset(
        dataset,
        likelihood=config.likelihood,
        binarization=binarization,
        batch=config.batch_size,
        size=replicas.size,
    )
    # A model that is split is never whole anywhere.
    model = assemble.model(config, dataset.shape, torch.device("meta") if groups is not None else world.device)
    trained, optimizer, pipeline = _distribute(config, world, groups, model, dataset)
    _check_apart(config, dataset)
    # Last: what cannot be run must not delete the results of an earlier run (--overwrite).
    folder = prepare_folder(config, world)
    resumed = _newest(folder, config, world) if not world.joins else None
    if resumed is not None:
        check_resumed(assemble.function_of(config, dataset.shape), resumed.record, resumed.name)
    if world.is_first and resumed is None:
        # At once: it also tells --overwrite that what follows is ours.
        write_config(config, folder / CONFIG_FILE)
    trainer, pictures = _trainer(config, model, trained, optimizer, pipeline, dataset, folder, resumed)
    if world.is_first:
        # Only now it is known what carries the mean, and that a checkpoint fits this configuration.
        write_config(_with_engine(config, optimizer), folder / CONFIG_FILE)
        if resumed is not None and (changed := changes(config, resumed.record)):
            say(f"hvdvae: goes on with {', '.join(changed)}")
        processor: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        say(opening(config, trainer, dataset, folder, asked.named, processor))
    try:
        outcome = trainer.fit(config.epochs)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; {fits(config, dataset.train)}") from error
    if world.joins:
        with deaf_to_warnings():
            world.close()  # Those who were there from the start evaluate.
        return exit_status(outcome)
    if outcome.signal:
        if world.is_first:
            name = signal.Signals(outcome.signal).name
            say(
                f"{name}: saved at step {outcome.step} in {folder / 'checkpoints'}; "
                f"continue with --resume --out {folder}"
            )
        world.close()
        return exit_status(outcome)
    with deaf_to_warnings():
        try:
            with termination_interrupts():
                surviving(
                    trainer, lambda: _conclude(config, trainer, model, dataset, pictures, folder, outcome, started)
                )
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(
                f"interrupted in the final test; training is saved: --resume --out {folder} makes up for it"
            ) from None
        world.close()
    return 0


def _with_engine(config: TrainConfig, optimizer: Strategy) -> TrainConfig:
    """The engine that was chosen, where there is one: not in one process, nor where a codec's messages are carried."""
    if config.strategy not in ("allreduce", "sharded") or config.compression != "none":
        return config
    engine: Any = optimizer.engine
    return replace(config, engine=engine) if engine in ("horovod", "mpi") else config


def _distribute(
    config: TrainConfig, world: World, groups: Groups | None, model: VAE, dataset: Dataset
) -> tuple[nn.Module, Strategy, "Pipeline | None"]:
    """The model as it is trained, and its optimizer over all ranks. Blocks; every rank must call it."""
    mean = None
    if config.likelihood == "bernoulli":
        # All read a share: a source that takes rank 0 minutes would have the others wait to their deadline.
        mean = mean_example(
            dataset.train,
            rank=world.rank,
            size=world.size,
            sum_over_ranks=lambda total: world.sum_(total, "sum of the training examples"),
        )
    trained: nn.Module = model
    parts, pipeline = None, None
    if groups is not None:
        parts, pipeline = assemble.split(config, model, groups)
        assemble.fill_part(config, model, parts.cuts, mean, world.device)
    elif mean is not None:
        set_output_bias(model, mean)
    replicas = world if groups is None else groups.replicas
    if config.sync_batch_norm:
        trained = convert_sync_batch_norm(model, replicas)
    optimizer = assemble.distributed(config, trained, replicas, parts)
    if config.compile:
        trained.compile()
    return trained, optimizer, pipeline


def _trainer(
    config: TrainConfig,
    model: VAE,
    trained: nn.Module,
    optimizer: Strategy,
    pipeline: "Pipeline | None",
    dataset: Dataset,
    folder: Path,
    resumed: Source | None,
) -> tuple[Trainer, Pictures]:
    world, replicas, binarization = optimizer.whole, optimizer.world, assemble.binarization(config, dataset.train)
    loader = Loader(
        dataset.train,
        batch=config.batch_size * config.accumulate,
        rank=replicas.rank,
        size=replicas.size,
        seed=config.seed,
        likelihood=config.likelihood,
        binarization=binarization,
        device=world.device,
    )
    pictures = Pictures(model, dataset.validation, binarization=binarization)
    boards: list[TensorBoard] = []

    def monitors() -> list[Monitor]:
        step = trainer.position.step
        boards.append(TensorBoard(folder / "tensorboard", first_step=step))
        progress = Progress(epochs=config.epochs, done=trainer.epochs_done)
        return [progress, JsonLines(folder / "metrics.jsonl", first_step=step), *boards]

    def validate() -> dict[str, float]:
        samples = assemble.validation_samples(config)
        # Where ranks do not step together, rank 0 evaluates while the others train on.
        judges = replicas if optimizer.synchronous else World.alone(device=str(world.device))
        found = assess(model, dataset.validation, judges, binarization=binarization, samples=samples)
        epoch = trainer.position.epoch
        # All ranks of the first copy of the model compute, one of them writes.
        if replicas.is_first and config.pictures_every and epoch % config.pictures_every == 0:
            pictures.draw()
            if world.is_first:
                pictures.to_tensorboard(boards[0], trainer.position.step)
        return validation_numbers(config, found)

    trainer = Trainer(
        trained,
        optimizer,
        assemble.objective(config),
        loader,
        seed=config.seed,
        schedule=assemble.schedule(config),
        precision=config.precision,
        ema_decay=config.ema,
        skip_limit=config.skip_limit,
        lr_scaling=config.lr_scaling,
        monitors=monitors,
        checkpoints=checkpoints.Folder(folder / "checkpoints", config.keep),
        checkpoint_every=config.checkpoint_every,
        validate=validate,
        validate_every=config.validate_every,
        config={
            **{name: getattr(config, name) for name in TrainConfig.__dataclass_fields__},
            "shape": list(dataset.shape),
            "limits": list(input_limits(dataset.train)),
            "function": assemble.function_of(config, dataset.shape),
            "data_digest": digest(dataset.train),
        },
        pipeline=pipeline,
    )
    if resumed is not None:
        trainer.resume(resumed)
    return trainer, pictures


def _check_apart(config: TrainConfig, dataset: Dataset) -> None:
    """Raises ConfigError where pictures of this run would be taken for data by the next."""
    images = Path(dataset.train.path)
    if config.out is not None and images.is_dir() and images.resolve() in Path(config.out).resolve().parents:
        raise ConfigError(
            f"--out {config.out} lies among the images of --data {config.data}: choose a folder elsewhere"
        )


def _newest(folder: Path, config: TrainConfig, world: World) -> Source | None:
    """The checkpoint to resume from, read by rank 0, which may alone see the folder, and sent to all."""
    if not config.resume:
        return None
    found: Path | None = None
    if world.is_first:
        kept = checkpoints.Folder(folder / "checkpoints", config.keep)
        found = kept.newest_good()
        if found is None and kept.steps():
            raise CheckpointError(
                f"--resume: no checkpoint in {kept.folder} is whole: delete them to start anew, or choose another --out"
            )
        if found is None:
            say(f"--resume: no checkpoint in {folder / 'checkpoints'} yet, starting anew")
    return checkpoints.spread(found, world)


def _conclude(
    config: TrainConfig,
    trainer: Trainer,
    model: VAE,
    dataset: Dataset,
    pictures: Pictures,
    folder: Path,
    outcome: Outcome,
    started: float,
) -> None:
    """Test the best weights, write pictures and the summary, and say where everything is.

    Raises NonFiniteError on all ranks, once all is written, where nothing was learned.
    """
    world, samples = trainer.world, assemble.nll_samples(config)
    steps = world.gather_objects((outcome.step, outcome.skipped_steps), "gather of the steps that were skipped")
    # Where ranks do not step together rank 0 alone validates.
    validated = world.gather_objects(trainer.best is not None, "agreement on the best epoch")[0]
    best = checkpoints.spread(assemble.checkpoint_file(folder, "best") if world.is_first else None, world)
    if best is not None:
        load_weights(model, part_of(trainer, best), ema=True)
    summary = {
        "strategy": config.strategy,
        "engine": trainer.optimizer.engine,
        "world_size": world.size,
        "epochs": outcome.epochs,
        "steps": outcome.step,
        "skipped_steps": outcome.skipped_steps,
        "examples_per_second": outcome.examples / outcome.seconds if outcome.seconds else None,
        "training_seconds": outcome.seconds,
        "peak_rss_bytes": peak_rss(world),
        **({"died": trainer.died} if trainer.died else {}),
        **({"mesh": str(parts.groups.mesh)} if (parts := trainer.optimizer.parts) is not None else {}),
        **({"pipeline": trainer.pipeline.results()} if trainer.pipeline is not None else {}),
        **trainer.optimizer.results(),
    }
    if samples:
        binarization = assemble.binarization(config, dataset.train)
        with trainer.optimizer.arithmetic():
            found = assess(
                model,
                dataset.test,
                trainer.optimizer.world,
                binarization=binarization,
                samples=samples,
                title=f"test NLL, k={samples}",
            )
        summary |= {
            "elbo": found.elbo,
            "rate": found.rate,
            "distortion": found.distortion,
            "test_nll": found.nll,
            "nll_samples": samples,
            "active_units": list(found.active_units),
        }
    summary |= {
        "seconds": time.time() - started,
        "data": dataset.name,
        "model": config.model,
        "precision": config.precision,
        "device": str(world.device),
        "versions": versions(),
        "host": world.host,
    }
    if trainer.optimizer.world.is_first:
        with trainer.optimizer.arithmetic():
            pictures.draw()
    bad = complaint(config, dataset.test, summary.get("test_nll"), steps, what="this run", validated=validated)
    if world.is_first:
        written = pictures.to_files(folder)
        board = TensorBoard(folder / "tensorboard")
        pictures.to_tensorboard(board, outcome.step)
        board.close()
        write_json(folder / "summary.json", keep_speed(summary, folder / "summary.json"))
        say(closing(summary, folder, written, finished=not bad, legend=pictures.legend))
    world.barrier("rank 0 writes the results")
    if bad:
        raise NonFiniteError(f"{bad}; what there is lies in {folder}")


def peak_rss(world: World) -> list[int]:
    """Largest resident memory of each rank so far, in bytes. Blocks; every rank must call it."""
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [int(value) for value in world.gather_objects(kilobytes * 1024, "gather of peak memory")]
