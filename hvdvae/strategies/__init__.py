"""Ways of parallelizing SGD, each an optimizer: `DistributedOptimizer(optimizer, model, strategy=...)`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.ps.plan import Plan
from hvdvae.strategies.engine import choose_engine
from hvdvae.strategies.fitting_options import check_options
from hvdvae.strategies.flat_optimizer import check_elementwise
from hvdvae.strategies.local import Local
from hvdvae.strategies.strategy import Strategy
from hvdvae.strategies.wrapping import carrying_on
from hvdvae.world import World

if TYPE_CHECKING:
    from hvdvae.parallel.parts import Parts

STRATEGIES = ("local", "allreduce", "sharded", "local-sgd", "diloco", "ps")
SYNC_EVERY = {"local-sgd": 16, "diloco": 64}
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9
"""Of diloco: Douillard et al. 2023."""


@carrying_on
def DistributedOptimizer(  # noqa: N802 - the name that Horovod's users know
    optimizer: Optimizer,
    model: nn.Module,
    *,
    world: World | None = None,
    strategy: str = "allreduce",
    engine: str | None = None,
    backward_passes_per_step: int = 1,
    clip_norm: float | None = None,
    compression: str = "none",
    compression_share: float | None = None,
    compression_rank: int | None = None,
    compression_momentum: float = 0.0,
    sync_every: int | None = None,
    adaptive_sync: bool = False,
    outer_lr: float | None = None,
    outer_momentum: float | None = None,
    group_size: int = 1,
    reduce_op: str = "average",
    process_set: Any = None,
    servers: int | None = None,
    zero_stage: int = 1,
    weights: str = "fp32",
    plan: Plan | None = None,
    parts: "Parts | None" = None,
) -> Strategy:
    """Wrap a torch optimizer so that its step is taken together with all ranks.

    Mutates the model: its parameters become views of one vector, with rank 0's values. Blocks; every rank must call it.
    On the ranks of parameter servers it serves until the workers have ended, and then ends the process.

    world: this process's World (default: one for the launcher that started it).
    strategy: local, allreduce (synchronous SGD), sharded (the same, its optimizer split over the ranks), local-sgd and
        diloco (averages now and then), or ps (parameter servers).
    engine: what carries the mean (allreduce, sharded): horovod (default), mpi, or auto.
    backward_passes_per_step: how many gradients are accumulated before a step; they are averaged, not summed.
    clip_norm: global norm at which the mean gradient is clipped.
    compression: of gradients on the wire: none, or a codec of hvdvae.compression; its share, rank and momentum
        correction, where it has them.
    sync_every, adaptive_sync: steps between two averages, and whether they become fewer as the loss falls (local-sgd,
        diloco). outer_lr, outer_momentum: of diloco. group_size: ranks that average at every step; 0: those of a host.
    reduce_op: average, or adasum (engine horovod; Maleki et al. 2021).
    process_set: the horovod ProcessSet that trains this model (engine horovod; default all ranks).
    servers: pieces of the weights, each with a rank that serves it, the last ones (ps; default those of `world`, or 1).
    zero_stage: what ranks share (sharded): 1, the optimizer's state; 2, gradients too.
    weights: what a rank holds of all weights: fp32, or (sharded, zero_stage 2) bf16, and fp32 of its share alone;
        train and evaluate under torch.autocast then (`optimizer.arithmetic()`); the model's state_dict has what is
        rounded, the exact ones are in `optimizer.master_weights()`.
    plan: consistency, rule and periods of the parameter server (ps; default asynchronous).
    parts: where `model` is this rank's part of one that several ranks hold (hvdvae.parallel), with allreduce and
        sharded; `world` has the ranks that hold the same part then.

    An optimizer that is wrapped already, or what this returned for it, is wrapped anew: the state is carried on, and
    the former wrapper steps no more. So parameters that were unfrozen come to be trained.

    Raises ConfigError for options that do not go together, WorldError where ranks or libraries do not.
    """
    check_options(
        strategy,
        engine=engine,
        compression=compression,
        compression_share=compression_share,
        compression_rank=compression_rank,
        compression_momentum=compression_momentum,
        reduce_op=reduce_op,
        process_set=process_set,
        zero_stage=zero_stage,
        weights=weights,
        sync_every=sync_every,
        adaptive_sync=adaptive_sync,
        outer_lr=outer_lr,
        outer_momentum=outer_momentum,
        group_size=group_size,
        servers=servers,
        plan=plan,
    )
    if world is None:
        replicas = plan.replicas if plan is not None else 0
        world = World.create(servers=(servers or 1) * (1 + replicas)) if strategy == "ps" else World.create()
    options: dict[str, Any] = {"backward_passes_per_step": backward_passes_per_step, "clip_norm": clip_norm}
    if parts is not None:
        _check_parts(optimizer, model, parts, strategy, compression, reduce_op)
        if world.size == 1 and weights == "fp32":
            alone = Local(optimizer, model, world, **options)
            alone.hold(parts)
            return alone
    if strategy == "local":
        if world.size > 1:
            raise ConfigError(
                f"strategy 'local' (--strategy) trains in one process, but {world.size} ranks were started: "
                "use --strategy allreduce, or start one process"
            )
        return Local(optimizer, model, world, **options)
    short: dict[str, Any] = {"share": compression_share, "rank": compression_rank}
    if strategy in SYNC_EVERY:
        from hvdvae.strategies.local_sgd import DiLoCo, LocalSgd

        options |= {
            "sync_every": SYNC_EVERY[strategy] if sync_every is None else sync_every,
            "adaptive": adaptive_sync,
            "group_size": group_size,
        }
        options |= {"compression": compression, **short}
        if strategy == "local-sgd":
            return LocalSgd(optimizer, model, world, **options)
        options["outer_lr"] = OUTER_LR if outer_lr is None else outer_lr
        options["outer_momentum"] = OUTER_MOMENTUM if outer_momentum is None else outer_momentum
        return DiLoCo(optimizer, model, world, **options)
    if strategy == "ps":
        plan = plan or Plan()
        if compression != "none":
            plan = replace(
                plan,
                compression=compression,
                compression_share=compression_share,
                compression_momentum=compression_momentum,
            )
        return _ps(optimizer, model, world, servers, plan, options)
    if strategy not in ("allreduce", "sharded"):
        raise ConfigError(f"strategy (--strategy) is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    chosen = choose_engine(engine, world, compression=compression, reduce_op=reduce_op, process_set=process_set)
    if strategy == "sharded" and weights == "bf16":
        from hvdvae.strategies.master_weights import MasterWeights

        wrapped: Strategy = MasterWeights(optimizer, model, world, engine=chosen.name, **options)
    elif strategy == "sharded" and zero_stage == 2:
        from hvdvae.strategies.sharded_gradients import ShardedGradients

        wrapped = ShardedGradients(optimizer, model, world, engine=chosen.name, **options)
    elif strategy == "sharded":
        from hvdvae.strategies.sharded import Sharded

        wrapped = Sharded(optimizer, model, world, engine=chosen.name, **options)
    elif chosen.name == "mpi" and compression != "none":
        from hvdvae.strategies.allreduce_compressed import CompressedAllreduce

        options |= {"compression": compression, "momentum": compression_momentum, **short}
        wrapped = CompressedAllreduce(optimizer, model, world, **options)
    else:
        wrapped = _wrap(chosen.name, optimizer, model, world, compression, reduce_op, process_set, options)
    wrapped.engine, wrapped.engine_reason = chosen
    if parts is not None:
        wrapped.hold(parts)
    return wrapped


def _check_parts(
    optimizer: Optimizer, model: nn.Module, parts: "Parts", strategy: str, compression: str, reduce_op: str
) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if parts.groups.stages.size > 1 and [*map(id, held)] != [*map(id, model.parameters())]:
        raise ConfigError(
            f"the optimizer has {len(held)} parameters, and a stage's are numbered as the model's "
            f"{len([*model.parameters()])}: give it model.parameters(), frozen ones too, in their order"
        )
    if strategy not in ("allreduce", "sharded") or compression != "none" or reduce_op != "average":
        raise ConfigError(
            f"models that are split over ranks train with --strategy allreduce or sharded, without --compression and "
            f"--reduce-op, found --strategy {strategy}, --compression {compression}, --reduce-op {reduce_op}"
        )
    check_elementwise(optimizer, "this model's parameters are split over ranks")


def _ps(
    optimizer: Optimizer, model: nn.Module, world: World, servers: int | None, plan: Plan, options: dict[str, Any]
) -> Strategy:
    wanted = (servers or 1) * (1 + plan.replicas)
    if world.servers == 0 or (servers is not None and wanted != world.servers):
        raise ConfigError(
            f"strategy 'ps' (--strategy) with {wanted} ranks that serve in a World of {world.servers}: make it with "
            f"World.create(servers={wanted}), under mpirun or srun with {wanted + 1} ranks or more"
        )
    workers = world.size if world.role == "trainer" else world.everyone.size - world.servers
    plan.check(workers=workers, servers=world.servers)
    from hvdvae.ps.serve import serve_and_exit
    from hvdvae.strategies.ps import ParameterServer

    if world.role == "server":
        serve_and_exit(world, plan)
    return ParameterServer(optimizer, model, world, plan=plan, **options)


def _wrap(
    engine: str,
    optimizer: Optimizer,
    model: nn.Module,
    world: World,
    compression: str,
    reduce_op: str,
    process_set: Any,
    options: dict[str, Any],
) -> Strategy:
    # Imported where they are chosen: Horovod and MPI need not be there for the others.
    if engine != "horovod":
        from hvdvae.strategies.allreduce_mpi import MpiAllreduce
        from hvdvae.strategies.allreduce_shared import SharedAllreduce, can_share

        if can_share(optimizer, model, world):
            return SharedAllreduce(optimizer, model, world, **options)
        return MpiAllreduce(optimizer, model, world, **options)
    from hvdvae.strategies.allreduce_horovod import HorovodAdasum, HorovodAllreduce

    if reduce_op == "adasum":
        return HorovodAdasum(optimizer, model, world, **options)
    return HorovodAllreduce(optimizer, model, world, compression=compression, process_set=process_set, **options)


__all__ = ["OUTER_LR", "OUTER_MOMENTUM", "STRATEGIES", "SYNC_EVERY", "DistributedOptimizer", "Plan", "Strategy"]
