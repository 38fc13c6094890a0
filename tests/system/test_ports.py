"""What ranks of one host leave open to others: no port."""

import signal
import time
from pathlib import Path

import psutil

from tests.system.conftest import Start


def test_ranks_of_one_host_listen_on_no_port(start: Start, tmp_path: Path, images: Path) -> None:
    few = ("--hidden", "4", "--latent", "2", "--epochs", "100000", "--batch-size", "24", "--out", "run")
    engine = ("--engine", "mpi", "--nll-samples", "0", "--pictures-every", "0")
    job = start(2, "-m", "hvdvae", "train", "--data", str(images), *few, *engine, OMPI_MCA_btl="")
    give_up = time.monotonic() + 90
    while not (tmp_path / "run" / "checkpoints").exists():
        assert time.monotonic() < give_up, job.finish(5).output
        assert job.process.poll() is None, job.finish(5).output
        time.sleep(0.1)
    launcher = psutil.Process(job.process.pid)
    ranks = [child for child in launcher.children(recursive=True) if "hvdvae" in child.cmdline()]
    assert len(ranks) == 2
    open_to = [each.laddr for rank in ranks for each in rank.net_connections("inet") if each.status == "LISTEN"]
    assert open_to == []
    job.process.send_signal(signal.SIGUSR1)
    ended = job.finish(60)
    assert "SIGUSR1: saved at step" in ended.output
