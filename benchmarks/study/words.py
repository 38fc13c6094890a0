"""Scenarios and contenders in words. Pure."""

from dataclasses import fields

from benchmarks.study.study_file import Contender, Scenario
from hvdvae.cli.assemble import optimizer_name
from hvdvae.config import ServerOptions, StrategyOptions, flag
from hvdvae.disturbance import By, Jitter, Kill, Slow, Stop, Trouble

_PEERS = {"horovod": "raw Horovod, DistributedOptimizer with a hook a tensor", "ddp": "PyTorch DDP"}
_BY: dict[By, str] = {"compute": "real extra compute", "sleep": "asleep, not computing"}


def of_scenario(scenario: Scenario) -> str:
    """What happens in it."""
    parts = [_of_trouble(trouble) for trouble in scenario.troubles]
    if scenario.link_mbit is not None:
        parts.append(f"each rank a host of its own, on a link of {scenario.link_mbit:g} Mbit/s")
    if scenario.shares is not None:
        parts.append(f"ranks hold unequal parts of the data, {':'.join(f'{share:g}' for share in scenario.shares)}")
    return "; ".join(parts) or "all ranks alike"


def _of_trouble(trouble: Trouble) -> str:
    match trouble:
        case Slow(rank=rank, factor=factor, by=by):
            return f"rank {rank} takes {factor:g} times as long for a step ({_BY[by]})"
        case Jitter(mean=mean, sigma=sigma, by=by):
            return (
                f"steps take longer at random: log-normal, {mean:g} of a step in the mean, sigma {sigma:g} ({_BY[by]})"
            )
        case Stop(rank=rank, seconds=seconds, at_step=step):
            return f"rank {rank} stops for {seconds:g} s at its step {step}"
        case Kill(rank=rank, at_step=step):
            return f"rank {rank} is killed at its step {step}"


def of_contender(contender: Contender) -> str:
    """What it is, and what was set."""
    if contender.peer is not None:
        parts = [_PEERS[contender.peer]]
        if contender.peer == "ddp":
            parts.append("gradients as bucket views, static graph" if contender.hook != "powersgd" else "bucket views")
        if contender.hook != "none":
            parts.append(f"{contender.hook} on the wire")
    else:
        parts = ["hvdvae"]
        for field in (*fields(StrategyOptions), *fields(ServerOptions)):
            value = getattr(contender.config, field.name)
            if field.name == "strategy" or value != field.default:
                parts.append(f"{flag(field.name)} {value}".removesuffix(" True"))
    parts.append(optimizer_name(contender.config))
    parts.append(f"lr {contender.config.lr:g}{' x ranks' if contender.scales_lr else ''}")
    return ", ".join(parts)
