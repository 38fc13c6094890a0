"""`hvdvae slurm` prints batch scripts; those in launch/slurm/ are its output."""

import subprocess
from pathlib import Path

import pytest

from hvdvae.cli import main
from hvdvae.cli.options import SlurmOptions
from hvdvae.cli.slurm import script

FOLDER = Path(__file__).parents[2] / "launch" / "slurm"
READY = {
    "cpu.sbatch": SlurmOptions(train=[], nodes=2, ntasks_per_node=4),
    "gpu.sbatch": SlurmOptions(train=[], nodes=2, ntasks_per_node=4, gpus_per_node=4, cpus_per_task=8),
    "parameter-server.sbatch": SlurmOptions(train=[], nodes=2, ntasks_per_node=5, servers=2),
    "stretches.sbatch": SlurmOptions(train=[], nodes=2, ntasks_per_node=4, array=10),
}


@pytest.mark.parametrize("name", READY)
def test_the_ready_scripts_are_what_the_command_prints(name: str) -> None:
    assert (FOLDER / name).read_text() == script(READY[name], '"$@"')


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
@pytest.mark.parametrize("array", [1, 3])
def test_options_reach_the_script_as_they_are(
    launcher: str, array: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--nodes", "3", "--ntasks-per-node", "2", "--time", "00:10:00", "--launcher", launcher]
    train = ["--data", "mnist", "--out", "a folder", "--hidden", "200", "200"]
    assert main(["slurm", *words, "--array", str(array), "--", *train]) == 0
    found = capsys.readouterr().out
    assert {"#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=2", "#SBATCH --time=00:10:00"} <= set(found.splitlines())
    assert "hvdvae train --resume --data mnist --out 'a folder' --hidden 200 200" in found
    assert ("--array=1-3%1" in found) == (array == 3) == ("#SBATCH --requeue" not in found)
    file = tmp_path / "job.sbatch"
    file.write_text(found)
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2", "--", "--data", "mnist"], "no --out"),
        (["--nodes", "0", "--", "--out", "x"], "--nodes is 0"),
        (["--gpus-per-node", "2", "--ntasks-per-node", "4", "--", "--out", "x"], "share a GPU"),
        (["--servers", "1", "--", "--out", "x"], "leave none to train"),
        (["--launcher", "prun", "--", "--out", "x"], "--launcher"),
        (["--lr", "3"], "--lr is no flag of hvdvae slurm, and flags of the job stand behind `--`"),
        (["--", "--out", "x", "--epocs", "3"], "--epocs is no flag of hvdvae train (did you mean --epochs?)"),
        (["--", "--out", "x", "--epochs", "0"], "--epochs is 0, expected at least 1"),
        (["--", "--out", "x", "--lr", "fast"], "--lr is 'fast'"),
        (["--", "--data", "mnist", "--out"], "--out has no value"),
        (["--", "--out", "x", "--config", "none.yaml"], "--config none.yaml"),
        (["--", "--out", "x", "--overwrite"], "--overwrite"),
        (["--ntasks-per-node", "4", "--", "--out", "x", "--strategy", "ps", "--servers", "4"], "leave none to train"),
        (["--ntasks-per-node", "4", "--", "--out", "x", "--strategy", "ps", "--servers", "2", "--replicas", "1"], "4"),
        (["--ntasks-per-node", "4", "--servers", "1", "--", "--out", "x", "--strategy", "allreduce"], "--servers"),
        (["--ntasks-per-node", "4", "--servers", "1", "--", "--out", "x", "--servers", "2"], "say different things"),
        (["--ntasks-per-node", "4", "--servers", "1", "--", "--out", "x", "--backup-workers", "1"], "--consistency"),
        (["--ntasks-per-node", "4", "--", "--out", "x", "--pipeline", "3"], "4 are no multiple"),
        (["--nodes", "2", "--", "--out", "x", "--strategy", "local"], "one process"),
        (["--", "mpirun", "-np", "2", "python", "train.py"], "the script starts the ranks itself"),
        (["--", "train.py"], "expected what runs it: python train.py"),
        (["--", "hvdvae", "evaluate", "runs/a"], "expected options of hvdvae train"),
        (["--servers", "1", "--", "python", "train.py"], "--servers 1 is for options of hvdvae train"),
        (["--partition", "gpu 2", "--", "--out", "x"], "--partition is 'gpu 2'"),
        (["--modules", "a;b", "--", "--out", "x"], "--modules is 'a;b'"),
        (["--memory", "lots", "--", "--out", "x"], "--memory is 'lots'"),
        (["--mail-user", "me", "--", "--out", "x"], "other flags of sbatch are given to sbatch itself"),
        (["--nodes", "2", "--", "--out", "x", "--replace-workers"], "a death ends the script's job"),
    ],
)
def test_bad_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("before", [True, False])
def test_servers_do_not_share_a_gpu_wherever_they_are_asked_for(
    before: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--nodes", "2", "--ntasks-per-node", "5", "--gpus-per-node", "4"]
    asked = ["--servers", "2"]
    train = ["--out", "x", "--strategy", "ps", *([] if before else asked)]
    assert main(["slurm", *words, *(asked if before else []), "--", *train]) == 0
    assert main(["slurm", *words, "--", "--out", "x"]) == 2
    assert "share a GPU" in capfd.readouterr().err


def test_a_file_of_train_may_name_the_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("out: run\nepochs: 3\n")
    assert main(["slurm", "--", "--config", str(file)]) == 0
    assert f"train --resume --config {file}" in capfd.readouterr().out


@pytest.mark.parametrize("time", ["4", "00:04:00", "3:59", "0-00:02:30", "soon", "1:2:3:4:5"])
def test_times_that_leave_no_room_to_come_further_are_refused(time: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--time", time, "--", "--out", "run"]) == 2
    assert "--time is" in capfd.readouterr().err


@pytest.mark.parametrize("time", ["5", "4:01", "00:10:00", "1-0", "2-12:30", "2-12:30:05", "0", "UNLIMITED"])
def test_times_as_sbatch_takes_them(time: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--time", time, "--", "--out", "run"]) == 0
    assert f"#SBATCH --time={time}\n" in capfd.readouterr().out


SITE = ["--partition", "gpu", "--account", "proj-7", "--qos", "long", "--constraint", "a100|h100", "--memory", "64G"]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("array", [1, 3])
def test_options_of_the_site_are_lines_of_sbatch_and_modules_are_loaded(
    own: bool, array: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", "run"] if not own else ["python", "train.py", "--out", "run"]
    asked = [*SITE, "--modules", "gcc/12 openmpi/5", "--array", str(array)]
    assert main(["slurm", *asked, "--", *words]) == 0
    found = capsys.readouterr().out
    for line in ("partition=gpu", "account=proj-7", "qos=long", "constraint=a100|h100", "mem=64G"):
        assert f"#SBATCH --{line}\n" in found
    # Before anything that they bring is looked for.
    assert found.index("module load gcc/12 openmpi/5 || exit 2\n") < found.index("command -v hvdvae")
    assert found.rindex("#SBATCH") < found.index("module load")
    (tmp_path / "job.sbatch").write_text(found)
    assert subprocess.run(["bash", "-n", tmp_path / "job.sbatch"], check=False).returncode == 0


@pytest.mark.parametrize("dashes", [True, False])
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_script_of_ones_own_is_started_as_it_is(
    dashes: bool, launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--nodes", "2", "--ntasks-per-node", "4", "--launcher", launcher, *(["--"] if dashes else [])]
    assert main(["slurm", *words, "python", "train.py"]) == 0
    found = capsys.readouterr().out
    assert found.rstrip().endswith("python train.py")
    assert "supervise --requeue --restarts 0 -- " + launcher in found
    assert "hvdvae train" not in found
    assert "SIGUSR1" in found
    assert main(["slurm", *words[:6], "--", "python", "train.py", "--out", "a b", "--depth=3"]) == 0
    found = capsys.readouterr().out
    assert found.rstrip().endswith("python train.py --out 'a b' --depth=3")
    assert "supervise --requeue -- " + launcher in found


def test_hvdvae_train_may_be_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--", "hvdvae", "train", "--out", "run"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("hvdvae train --resume --out run")
