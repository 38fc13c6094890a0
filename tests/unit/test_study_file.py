"""Studies say what they ask, and every mistake in one is named with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study.cells import cells, order, same_question
from benchmarks.study.located import StudyError
from benchmarks.study.own_model import model_of
from benchmarks.study.study_file import Study, open_study, parse
from hvdvae.config import TrainConfig
from hvdvae.disturbance import Slow

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"

GOOD = """\
title: Who wins
data: digits
train: {model: mlp, batch_size: 20, lr: 1e-3}
world_sizes: [2, 4]
seeds: [0, 1, 2]
target: {contender: allreduce, epochs: 2}
budget: {epochs: 3, seconds: 60}
contenders:
  single: {strategy: local}
  allreduce: {strategy: allreduce, engine: mpi}
  ssp8:
    strategy: ps
    consistency: ssp
    staleness: 8
  horovod-n: {peer: horovod, scales_lr: true}
  ddp: {peer: ddp, hook: powersgd, lr: 0.002}
scenarios:
  uniform:
  slow: {slow: {rank: 1, factor: 3}}
"""


def study(text: str = GOOD) -> Study:
    return parse(text, "s.yaml")


def test_a_study_says_what_it_asks() -> None:
    found = study()
    assert (found.world_sizes, found.seeds, found.epochs, found.seconds) == ((2, 4), (0, 1, 2), 3, 60)
    assert found.contenders["ssp8"].config.staleness == 8
    assert found.contenders["ssp8"].config.batch_size == 20
    assert found.contenders["ddp"].config.lr == 0.002
    assert found.scenarios["slow"].troubles == (Slow(rank=1, factor=3.0),)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: str(path.stem))
def test_the_studies_that_come_along_are_good(path: Path) -> None:
    found, _ = open_study(path)
    assert cells(found)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("title: Who wins", "titel: Who wins", 1, "unknown key; did you mean title?"),
        ("title: Who wins\n", "", 1, "has no 'title'"),
        ("[2, 4]", "[2, 2]", 4, "expected each once"),
        ("[2, 4]", "[0, 2]", 4, "found 0, expected a whole number of at least 1"),
        ("[2, 4]", "two", 4, "found 'two', expected a list"),
        ("[0, 1, 2]", "[]", 5, "found [], expected a list"),
        ("lr: 1e-3", "lr: fast", 3, "found 'fast', expected a number"),
        ("lr: 1e-3", "lr: -1", 3, "--lr is -1"),
        ("lr: 1e-3", "seed: 3", 3, "unknown key"),
        ("contender: allreduce, epochs", "contender: allreduse, epochs", 6, "found 'allreduse', expected one of"),
        ("{contender: allreduce, epochs: 2}", "{nats: nan}", 6, "expected a number"),
        ("{contender: allreduce, epochs: 2}", "{nats: -20, epochs: 2}", 6, "expected `nats`, or"),
        ("{contender: allreduce, epochs: 2}", "{nats: 95, bound: nlll}", 6, "expected one of elbo, nll"),
        ("{epochs: 3, seconds: 60}", "{epochs: 3}", 7, "has no 'seconds'"),
        ("{epochs: 3, seconds: 60}", "{epochs: 0, seconds: 60}", 7, "expected a number above 0"),
        ("    staleness: 8", "    stalenes: 8", 14, "did you mean staleness?"),
        ("    staleness: 8", "    staleness: many", 14, "expected a whole number"),
        ("    strategy: ps", "    strategy: pss", 12, "expected one of local, allreduce"),
        ("    strategy: ps", "    strategy: allreduce", 12, "--consistency is for --strategy ps"),
        ("  ssp8:", "  SSP 8:", 11, "a name is part of file names"),
        ("  single:", "  allreduce:", 10, "stands twice"),
        ("{peer: ddp, hook: powersgd", "{peer: dpp, hook: powersgd", 16, "expected one of horovod, ddp"),
        ("hook: powersgd", "hook: magic", 16, "expected one of none, fp16, powersgd"),
        ("lr: 1e-3", "precision: bf16", 3, "unknown key"),
        ("{peer: ddp, hook", "{peer: ddp, clip_norm: 1, hook", 16, "ours alone"),
        ("peer: ddp, hook", "strategy: ps, hook", 16, "ours have `compression`"),
        ("peer: ddp, hook: powersgd", "peer: ddp, strategy: ps", 16, "either one of ours"),
        ("scales_lr: true", "scales_lr: maybe", 15, "expected true or false"),
        ("factor: 3", "factor: 0.5", 19, "factor is 0.5"),
        ("factor: 3", "by: sleep", 19, "has no 'factor'"),
        ("rank: 1, factor", "rank: 2, factor", 19, "the smallest world has ranks 0 to 1"),
        ("slow: {rank: 1, factor: 3}", "shares: [1, 2]", 19, "expected one a rank"),
        ("slow: {rank: 1, factor: 3}", "contenders: [ddp, hvd]", 19, "found 'hvd', expected one of single"),
        ("slow: {rank: 1, factor: 3}", "contenders: [ddp, ddp]", 19, "expected each once"),
        ("slow: {rank: 1, factor: 3}", "link_mbit: 0", 19, "expected a number above 0"),
        ("slow: {rank: 1, factor: 3}", "slwo: {rank: 1, factor: 3}", 19, "did you mean slow?"),
        ("{model: mlp, batch", "{model: mlp batch", 3, "no YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    with pytest.raises(StudyError) as error:
        study(GOOD.replace(old, new, 1))
    assert str(error.value).startswith(f"s.yaml, line {line}:"), error.value
    assert message in str(error.value)


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="No such file"):
        open_study(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StudyError, match="UTF-8"):
        open_study(tmp_path / "bytes.yaml")
    for text in ("", "- a\n- b\n", "just words"):
        with pytest.raises(StudyError, match=r"s.yaml, line 1"):
            study(text)


def test_cells_are_every_combination_once_and_one_process_once_a_scenario() -> None:
    found = cells(study())
    names = [cell.name for cell in found]
    assert len(set(names)) == len(names)
    # Four contenders at two sizes and one alone, in two scenarios with three seeds.
    assert len(found) == (4 * 2 + 1) * 2 * 3
    assert {cell.size for cell in found if cell.contender.name == "single"} == {1}


def test_a_scenario_may_name_its_contenders() -> None:
    found = cells(study(GOOD + "  few: {link_mbit: 10, contenders: [single, ddp]}\n"))
    few = [cell for cell in found if cell.scenario.name == "few"]
    assert {cell.contender.name for cell in few} == {"single", "ddp"}
    assert len(few) == (1 + 2) * 3
    assert len(found) - len(few) == len(cells(study())), "the others have all"


def test_the_order_turns_and_nobody_is_always_first() -> None:
    found = [cell for cell in cells(study()) if cell.size == 2 and cell.scenario.name == "uniform"]
    firsts = [found[start].contender.name for start in range(0, len(found), 4)]
    assert len(set(firsts)) == 3, "another one begins with each seed"
    assert [cell.seed for cell in found] == [0] * 4 + [1] * 4 + [2] * 4


def test_what_a_cell_is_told_follows_from_the_study() -> None:
    by_name = {cell.name: cell for cell in cells(study())}
    scaled = by_name["uniform.np4.horovod-n.seed1"]
    assert scaled.config().lr == pytest.approx(4e-3)
    assert scaled.config().seed == 1
    assert by_name["uniform.np4.ssp8.seed0"].ranks == 5, "a server is one more rank"
    strong = next(cell for cell in cells(study("strong_scaling: true\n" + GOOD)) if cell.size == 4)
    assert strong.config().batch_size == 5


def orders(text: str) -> dict[str, dict[str, Any]]:
    found = study(text)
    return {cell.name: order(found, cell) for cell in cells(found)}


def test_a_changed_study_is_another_question() -> None:
    before, after = orders(GOOD), orders(GOOD.replace("factor: 3", "factor: 4"))
    changed = {name for name in before if not same_question(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("slow.")}
    relearned = orders(GOOD.replace("lr: 1e-3", "lr: 2e-3"))
    assert not any(same_question(before[name], relearned[name]) for name in before if "ddp" not in name), (
        "ddp has a rate of its own"
    )


def test_a_kept_result_answers_its_question_after_an_option_was_added() -> None:
    for asked in orders(GOOD).values():
        kept = json.loads(json.dumps(asked))
        del kept["config"]["prefetch"], kept["hook" if kept["hook"] == "none" else "shares"]
        assert same_question(kept, asked)
        assert not same_question({**kept, "seed": 99}, asked)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("mypkg.TextVAE", "expected mlp, mlp2, conv, or a function of yours as package.module:function"),
        ("mypkg:TextVAE, hidden: [3]", "is of our models alone"),
        ("mlp3", "expected one of mlp, mlp2, conv"),
        ("my-pkg:build", "as package.module:function"),
    ],
)
def test_a_model_of_ones_own_is_a_function_of_a_module(model: str, words: str) -> None:
    with pytest.raises(StudyError, match=r"s\.yaml, line 3: train\.") as error:
        study(GOOD.replace("model: mlp", f"model: {model}"))
    assert words in str(error.value)
    mine = study(GOOD.replace("model: mlp", "model: my.package:build"))
    assert mine.build == "my.package:build"
    assert study().build is None
    asked = order(mine, cells(mine)[0])
    assert asked["build"] == "my.package:build"
    assert not same_question(asked, order(study(), cells(study())[0]))
    kept = {key: value for key, value in order(study(), cells(study())[0]).items() if key != "build"}
    assert same_question(kept, order(study(), cells(study())[0])), "what was measured before there was such a key"


def test_what_a_function_builds_is_a_vae_of_the_datas_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text(
        "import torch\n"
        "from hvdvae.vae import build_model\n"
        "def vae(shape): return build_model('mlp', shape, hidden=[4], latent=[2])\n"
        "def other(shape): return build_model('mlp', (3,), hidden=[4], latent=[2])\n"
        "def network(shape): return torch.nn.Linear(3, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    config, cpu = TrainConfig(seed=3), torch.device("cpu")
    one, again = (model_of("made_here:vae", config, (1, 8, 8), cpu) for _ in range(2))
    for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), "the seed alone says how it begins"
    for build, words in (
        ("made_here:other", r"of shape \(3,\), the data's examples are \(1, 8, 8\)"),
        ("made_here:network", "found a Linear, expected a hvdvae.vae.VAE"),
        ("made_here:none", "has no attribute 'none'"),
        ("not_made_here:vae", "No module named 'not_made_here'"),
    ):
        with pytest.raises(StudyError, match=words):
            model_of(build, config, (1, 8, 8), cpu)
