"""The result file: every block, the machine, and what failed. JSON-able.

models -> MODEL -> sides -> KEY -> examples_per_second, milliseconds_per_step, steps, cores_of_others: one a round
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.teams import ALL
from hvdvae.whole_file import write_whole

PER_ROUND = ("examples_per_second", "milliseconds_per_step", "steps", "cores_of_others")


class Record:
    """What is known so far."""

    def __init__(self, machine: dict[str, Any], config: dict[str, Any]) -> None:
        """`machine`: as machine.machine() says. `config`: models, rounds and the rest of the command line."""
        self.content: dict[str, Any] = {
            "config": config,
            **machine,
            "data": "",
            "models": {model: {"sides": _sides(model, config["rounds"])} for model in config["models"]},
            "memory": {},
            "failures": [],
        }

    def block(self, model: str, round_number: int, answer: dict[str, Any]) -> list[str]:
        """Note a team's answer; returns a line for people for each of its sides."""
        lines = []
        for key, result in answer["sides"].items():
            side = self.content["models"][model]["sides"][key]
            if "failed" in result:
                lines.append(self.failure(f"{model}, {side['what']}", result["failed"]))
                continue
            rate, pace = result["examples"] / result["seconds"], 1e3 * result["seconds"] / result["steps"]
            for name, value in zip(PER_ROUND, (rate, pace, result["steps"], answer["others"]), strict=True):
                side[name][round_number] = value
            lines.append(f"{model} round {round_number + 1}: {side['what']:<62}{rate:9,.0f} examples/s {pace:8.2f} ms")
        return lines

    def failure(self, what: str, why: str) -> str:
        """Note that something failed; returns a line for people."""
        line = f"{what}: {why}"
        if line not in self.content["failures"]:
            self.content["failures"].append(line)
        return f"failed: {line}"

    def write(self, path: Path) -> None:
        """Replace the file."""
        write_whole(path, json.dumps(self.content, indent=1) + "\n")


def _sides(model: str, rounds: int) -> dict[str, dict[str, Any]]:
    return {
        side.key: {"what": side.what, "ranks": team.ranks, **{name: [None] * rounds for name in PER_ROUND}}
        for team in ALL
        for side in team.sides_of(model)
    }
