"""What a study asks, read from a YAML file; every mistake is named with its line, before anything runs. Pure."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from benchmarks.study.located import Located, StudyError, read, shown
from hvdvae.cli.config_file import expanded, read_text
from hvdvae.cli.values import checked, expected
from hvdvae.config import TrainConfig, flag
from hvdvae.disturbance import Jitter, Kill, Slow, Stop, Trouble
from hvdvae.errors import ConfigError

PEERS = {"horovod": ("none", "fp16"), "ddp": ("none", "fp16", "powersgd")}
"""Competitors that are not ours, and what they can do to fewer bytes."""
BOUNDS = ("elbo", "nll")
TROUBLES: dict[str, type] = {"slow": Slow, "jitter": Jitter, "stop": Stop, "kill": Kill}
NOT_A_CONTENDERS = (
    *("seed", "out", "resume", "overwrite", "data", "epochs", "checkpoint_every", "keep", "pictures_every"),
    *("validate_every", "nll_samples", "threads", "deadline", "skip_limit", "lr_scaling", "accumulate", "precision"),
    *("schedule", "warmup", "step_epochs", "gamma", "ema", "compile", "sync_batch_norm"),
)
"""Keys of hvdvae train that the study itself decides, or that its loop, which all share, does not have."""


@dataclass(frozen=True)
class Contender:
    """One way of parallelizing."""

    name: str
    config: TrainConfig
    """Of the run, but for the seed. For a peer: model, batch size, learning rate."""
    peer: str | None = None
    """horovod or ddp; None: ours."""
    hook: str = "none"
    """What a peer does to gradients on the wire."""
    scales_lr: bool = False
    """Learning rate times the number of ranks, as Horovod's guide has it."""

    @property
    def alone(self) -> bool:
        """Whether it is one process, whatever the world size."""
        return self.peer is None and self.config.strategy == "local"

    def servers(self) -> int:
        """Ranks besides those that train."""
        ours = self.config
        return ours.servers * (1 + ours.replicas) if self.peer is None and ours.strategy == "ps" else 0


@dataclass(frozen=True)
class Scenario:
    """Conditions under which contenders are measured."""

    name: str
    troubles: tuple[Trouble, ...] = ()
    link_mbit: float | None = None
    """Rate of the link of each rank, which is then a host of its own (a network namespace)."""
    shares: tuple[float, ...] | None = None
    """Parts of the training data that each rank holds; None: all ranks share all of it."""
    contenders: tuple[str, ...] | None = None
    """Those that are measured in it, which the target's own need not be; None: all."""

    @property
    def kills(self) -> bool:
        """Whether a rank dies."""
        return any(isinstance(trouble, Kill) for trouble in self.troubles)


@dataclass(frozen=True)
class Target:
    """A bound on the validation likelihood to be reached: a number, or what a contender reaches after some epochs."""

    bound: str = "elbo"
    """elbo; or nll, the importance-weighted bound, which takes longer to judge."""
    nats: float | None = None
    contender: str | None = None
    epochs: float | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """All of it."""

    title: str
    data: str
    world_sizes: tuple[int, ...]
    """Ranks that train; servers come on top."""
    seeds: tuple[int, ...]
    target: Target
    epochs: float
    """Budget of a cell, all ranks together."""
    seconds: float
    """Budget of a cell."""
    snapshot_epochs: float
    """Between two looks at the model."""
    nll_samples: int
    strong_scaling: bool
    """Whether `batch_size` is that of all ranks together, and each takes its part; else it is each rank's."""
    contenders: dict[str, Contender]
    scenarios: dict[str, Scenario]
    build: str | None = None
    """MODULE:FUNCTION that builds the model of all contenders; None: one of ours."""


_Value = TypeVar("_Value")
_KEYS = (*(field.name for field in fields(Study) if field.name != "build"), "train", "budget")
OF_OUR_MODELS = ("hidden", "latent", "activation", "batch_norm")
"""Keys that say nothing to a function of the user's."""


def open_study(path: Path) -> tuple[Study, str]:
    """A study and the text of its file. Raises StudyError."""
    try:
        text = read_text(path, str(path))
    except ConfigError as error:
        raise StudyError(str(error)) from None
    return parse(text, path.name), text


def parse(text: str, name: str) -> Study:
    """A study from YAML. Raises StudyError naming `name` and the line."""
    top = read(text, name)
    required = ("title", "world_sizes", "seeds", "target", "budget", "contenders", "scenarios")
    parts = top.mapping([key for key in _KEYS if key not in ("epochs", "seconds")], required)
    build = _build(parts["train"]) if "train" in parts else None
    shared = _options(parts["train"], NOT_A_CONTENDERS, ("model",) if build else ()) if "train" in parts else {}
    contenders = {
        key: _contender(key, part, shared, parts.get("train", part))
        for key, part in _named(parts["contenders"]).items()
    }
    budget = parts["budget"].mapping(("epochs", "seconds"), ("epochs", "seconds"))
    sizes = tuple(item.whole(1) for item in parts["world_sizes"].items())
    scenarios = {key: _scenario(key, part, sizes, contenders) for key, part in _named(parts["scenarios"]).items()}
    return Study(
        title=parts["title"].text(),
        data=_path(parts["data"]) if "data" in parts else "digits",
        world_sizes=_once(parts["world_sizes"], sizes),
        seeds=_once(parts["seeds"], tuple(item.whole(0) for item in parts["seeds"].items())),
        target=_target(parts["target"], contenders),
        epochs=budget["epochs"].positive(),
        seconds=budget["seconds"].positive(),
        snapshot_epochs=parts["snapshot_epochs"].positive() if "snapshot_epochs" in parts else 0.5,
        nll_samples=parts["nll_samples"].whole(1) if "nll_samples" in parts else 50,
        strong_scaling=_flag(parts["strong_scaling"]) if "strong_scaling" in parts else False,
        contenders=contenders,
        scenarios=scenarios,
        build=build,
    )


def _build(train: Located) -> str | None:
    """What `model: package.module:function` names. Raises StudyError where an option of our models stands beside it."""
    parts = train.any_mapping()
    found = parts["model"].value if "model" in parts else None
    if not isinstance(found, str) or not re.search(r"[.:]", found):
        return None
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", found):
        raise parts["model"].error(
            f"found {shown(found)}, expected mlp, mlp2, conv, or a function of yours as package.module:function"
        )
    for key in OF_OUR_MODELS:
        if key in parts or key.replace("_", "-") in parts:
            raise parts[key].error(f"is of our models alone, and {found} would not know of it")
    return found


def _path(part: Located) -> str:
    try:
        return expanded(part.text(), "data")
    except ConfigError as error:
        raise part.error(str(error)) from None


def _named(part: Located) -> dict[str, Located]:
    found = part.any_mapping()
    if not found:
        raise part.error("is empty, expected at least one")
    for key, item in found.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9+-]{0,49}", key):
            raise item.error("a name is part of file names: expected at most 50 small letters, digits, + and -")
    return found


def _once(part: Located, values: tuple[_Value, ...]) -> tuple[_Value, ...]:
    if len(set(values)) < len(values):
        raise part.error(f"found {list(values)}, expected each once")
    return values


def _flag(part: Located) -> bool:
    try:
        return bool(checked(part.value, bool))
    except ValueError:
        raise part.error(f"found {shown(part.value)}, expected true or false") from None


def _options(part: Located, refused: tuple[str, ...], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keys of hvdvae train, of their types."""
    hints = {key: hint for key, hint in get_type_hints(TrainConfig).items() if key not in refused}
    values = {}
    for key, item in part.mapping([*hints, *also]).items():
        if key in also:
            continue
        try:
            values[key] = checked(item.value, hints[key])
        except ValueError as error:
            raise item.error(f"found {shown(item.value)}, expected {expected(hints[key], error)}") from None
    return values


def _contender(name: str, part: Located, shared: dict[str, Any], train: Located) -> Contender:
    own = _options(part, NOT_A_CONTENDERS, ("peer", "hook", "scales_lr"))
    parts = part.any_mapping()
    peer = parts["peer"].text() if "peer" in parts else None
    if peer is not None and peer not in PEERS:
        raise parts["peer"].error(f"found {peer!r}, expected one of {', '.join(PEERS)}")
    hook = parts["hook"].text() if "hook" in parts else "none"
    if hook not in PEERS.get(peer or "", ("none",)):
        choices = ", ".join(PEERS[peer]) if peer else "none: ours have `compression`"
        raise parts["hook"].error(f"found {hook!r}, expected one of {choices}")
    if peer is not None and "strategy" in own:
        raise parts["strategy"].error("a contender is either one of ours, with a strategy, or a peer")
    if peer is not None and {"clip_norm", "compression"} & {**shared, **own}.keys():
        raise part.error("clip_norm and compression are ours alone, and a peer would not know of them: see `hook`")
    scales_lr = _flag(parts["scales_lr"]) if "scales_lr" in parts else False
    try:
        config = TrainConfig(**{"threads": 1, **shared, **own})
    except ConfigError as error:
        raise _culprit(str(error), part, train).error(str(error)) from None
    return Contender(name, config, peer, hook, scales_lr)


def _culprit(message: str, *parts: Located) -> Located:
    """The key that a message names by its flag, else the first part."""
    for part in parts:
        for key in part.value:
            if re.search(rf"{flag(key)}\b(?!-)", message):
                return part.child(key)
    return parts[0]


def _scenario(name: str, part: Located, sizes: tuple[int, ...], contenders: Collection[str]) -> Scenario:
    if part.value is None:
        return Scenario(name)
    parts = part.mapping([*TROUBLES, "link_mbit", "shares", "contenders"])
    troubles = tuple(_trouble(parts[key], TROUBLES[key]) for key in parts if key in TROUBLES)
    for key, item in parts.items():
        if key in TROUBLES and isinstance(item.value, dict) and "rank" in item.value:
            rank = item.child("rank").whole(0)
            if rank >= min(sizes):
                raise item.child("rank").error(f"found {rank}, but the smallest world has ranks 0 to {min(sizes) - 1}")
    shares = tuple(item.positive() for item in parts["shares"].items()) if "shares" in parts else None
    if shares is not None and {len(shares)} != set(sizes):
        raise parts["shares"].error(f"found {len(shares)} shares for world sizes {list(sizes)}, expected one a rank")
    link = parts["link_mbit"].positive() if "link_mbit" in parts else None
    chosen = _chosen(parts["contenders"], contenders) if "contenders" in parts else None
    return Scenario(name, troubles, link, shares, chosen)


def _chosen(part: Located, contenders: Collection[str]) -> tuple[str, ...]:
    for item in part.items():
        if item.text() not in contenders:
            raise item.error(f"found {item.text()!r}, expected one of {', '.join(contenders)}")
    return _once(part, tuple(item.text() for item in part.items()))


def _trouble(part: Located, kind: type) -> Trouble:
    hints = get_type_hints(kind)
    needed = [field.name for field in fields(kind) if field.name != "by"]
    values: dict[str, Any] = {}
    take: dict[Any, Callable[[Located], Any]] = {int: lambda item: item.whole(0), float: Located.number}
    for key, item in part.mapping(list(hints), needed).items():
        values[key] = take.get(hints[key], Located.text)(item)
    try:
        trouble: Trouble = kind(**values)
    except ConfigError as error:
        raise part.error(str(error)) from None
    return trouble


def _target(part: Located, contenders: dict[str, Contender]) -> Target:
    parts = part.mapping(("bound", "nats", "contender", "epochs"))
    bound = parts.pop("bound").text() if "bound" in parts else "elbo"
    if bound not in BOUNDS:
        raise part.child("bound").error(f"found {bound!r}, expected one of {', '.join(BOUNDS)}")
    if set(parts) == {"nats"}:
        return Target(bound, nats=parts["nats"].number())
    if set(parts) != {"contender", "epochs"}:
        raise part.error(f"found {list(parts)}, expected `nats`, or `contender` and `epochs`")
    name = parts["contender"].text()
    if name not in contenders:
        raise parts["contender"].error(f"found {name!r}, expected one of {', '.join(contenders)}")
    return Target(bound, contender=name, epochs=parts["epochs"].positive())
