"""The cells of a study and their order: one a contender, world size, scenario and seed. Pure."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.statistics_of_rounds import rotated
from benchmarks.study.study_file import Contender, Scenario, Study
from hvdvae.config import TrainConfig
from hvdvae.disturbance import Trouble


@dataclass(frozen=True)
class Cell:
    """One measurement: a job of its own."""

    contender: Contender
    size: int
    """Ranks that train."""
    scenario: Scenario
    seed: int
    strong_scaling: bool = False

    @property
    def name(self) -> str:
        """In file names."""
        return f"{self.scenario.name}.np{self.size}.{self.contender.name}.seed{self.seed}"

    @property
    def ranks(self) -> int:
        """All that are started."""
        return self.size + self.contender.servers()

    def config(self) -> TrainConfig:
        """Of its run."""
        ours = self.contender.config
        lr = ours.lr * (self.size if self.contender.scales_lr else 1)
        batch = ours.batch_size // (self.size if self.strong_scaling else 1)
        return replace(ours, seed=self.seed, lr=lr, batch_size=batch)


def cells(study: Study) -> list[Cell]:
    """In the order in which they run.

    Seed by seed, so that a study that was interrupted has something of everything; within a seed the contenders of one
    condition follow each other, beginning with another one each time: a machine that grows slower hits all alike. One
    process alone is measured once a scenario, whatever the world sizes.
    """
    found = []
    for turn, seed in enumerate(study.seeds):
        for scenario in study.scenarios.values():
            chosen = scenario.contenders
            contenders = [one for one in study.contenders.values() if chosen is None or one.name in chosen]
            alone = [one for one in contenders if one.alone]
            found += [Cell(one, 1, scenario, seed, study.strong_scaling) for one in alone]
            for place, size in enumerate(study.world_sizes):
                together = [one for one in contenders if not one.alone]
                found += [
                    Cell(one, size, scenario, seed, study.strong_scaling) for one in rotated(together, turn + place)
                ]
    return found


def order(study: Study, cell: Cell) -> dict[str, Any]:
    """All that decides what a cell measures, JSON-able: what its ranks are told."""
    return {
        "data": study.data,
        "epochs": study.epochs,
        "seconds": study.seconds,
        "snapshot_epochs": study.snapshot_epochs,
        "nll_samples": study.nll_samples,
        "bound": study.target.bound,
        "build": study.build,
        "size": cell.size,
        "seed": cell.seed,
        "contender": cell.contender.name,
        "peer": cell.contender.peer,
        "hook": cell.contender.hook,
        "config": asdict(cell.config()),
        "scenario": cell.scenario.name,
        "troubles": [{"kind": _kind(trouble), **asdict(trouble)} for trouble in cell.scenario.troubles],
        "link_mbit": cell.scenario.link_mbit,
        "shares": cell.scenario.shares if cell.size > 1 else None,
    }


def same_question(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two orders ask the same; an option that came later, and stands at its default, changes no question."""
    return _essence(one) == _essence(other)


def _essence(ordered: dict[str, Any]) -> dict[str, Any]:
    default = asdict(TrainConfig())
    plain = json.loads(json.dumps(ordered))
    spelled = plain.pop("config")
    # What these defaults stood for in orders that were kept before they were left out.
    stands_for = {"optimizer": "adamw" if spelled.get("strategy") == "diloco" else "adam", "engine": "horovod"}
    config = {
        key: value for key, value in spelled.items() if value != default.get(key) and value != stands_for.get(key)
    }
    return {key: value for key, value in {**plain, "config": config}.items() if value not in (None, [], "none", "elbo")}


def _kind(trouble: Trouble) -> str:
    return type(trouble).__name__.lower()
