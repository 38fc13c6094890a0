"""Rounds of blocks: every team once a round, in an order that turns; meanwhile the other teams sleep."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.record import Record
from benchmarks.statistics_of_rounds import rotated
from benchmarks.team_process import TeamError, TeamProcess
from benchmarks.teams import Team

Say = Callable[[str], None]


def measure(teams: Sequence[Team], record: Record, options: dict[str, Any], save: Callable[[], None], say: Say) -> None:
    """Measure all that record.content["config"] asks for. Blocks.

    `options`: as worker.main takes them. A team that fails is named in the record, and the others go on.
    """
    config = record.content["config"]
    running: dict[str, TeamProcess] = {}
    # A block with all its turns and warm-up, and what a busy machine makes of it.
    limit = 120 + 60 * config["seconds"]
    try:
        for team in teams:  # One after the other: the first may download.
            _start(team, running, record, options, say)
        for model in config["models"]:
            for number in range(config["rounds"]):
                for name in rotated([team.name for team in teams], number):
                    order = {"model": model, "seconds": config["seconds"], "round": number}
                    answer = _ask(name, running, order, limit, record, say)
                    for line in record.block(model, number, answer) if answer is not None else ():
                        say(line)
                save()
        for name in list(running):
            answer = _ask(name, running, {"finish": True}, limit, record, say)
            for rank, peak in enumerate(answer["peaks"] if answer is not None else ()):
                record.content["memory"][name][rank]["peak"] = peak
    finally:
        for process in running.values():
            process.end()


def _start(team: Team, running: dict[str, TeamProcess], record: Record, options: dict[str, Any], say: Say) -> None:
    try:
        process = TeamProcess(team, options)
        running[team.name] = process
        ready = process.ready()
    except TeamError as error:
        running.pop(team.name, None)
        say(record.failure(f"team {team.name}", str(error)))
        return
    record.content["data"] = ready["data"]
    record.content["memory"][team.name] = ready["memory"]


def _ask(
    name: str, running: dict[str, TeamProcess], order: dict[str, Any], limit: float, record: Record, say: Say
) -> dict[str, Any] | None:
    if name not in running:
        return None
    try:
        return running[name].ask(order, limit)
    except TeamError as error:
        del running[name]
        when = f"{order['model']} round {order['round'] + 1}" if "model" in order else "at the end"
        say(record.failure(f"team {name}, {when}", str(error)))
        return None
