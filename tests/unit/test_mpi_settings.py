"""What Open MPI is asked for before it starts."""

import shutil
from types import SimpleNamespace

import pytest

from hvdvae.world.settings import prefer, without_ports

EXCLUDED = "OMPI_MCA_mtl_ofi_provider_exclude"


def test_tcp_is_not_taken_for_a_fast_network() -> None:
    environ: dict[str, str] = {}
    prefer(environ)
    assert "net" in environ[EXCLUDED].split(",")


def test_what_the_user_says_of_providers_stands_alone() -> None:
    for name in (EXCLUDED, "OMPI_MCA_mtl_ofi_provider_include", "OMPI_MCA_opal_common_ofi_provider_include"):
        environ = {name: "psm2"}
        prefer(environ)
        assert {key: value for key, value in environ.items() if "provider" in key} == {name: "psm2"}


ONE_HOST = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_VERSION": "5.0.11",
}


def transports(environ: dict[str, str]) -> str | None:
    found = dict(environ)
    without_ports(found)
    return found.get("OMPI_MCA_btl")


def test_ranks_of_one_host_listen_on_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    assert transports(ONE_HOST) == "self,sm"
    for several in (
        {**ONE_HOST, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        {**ONE_HOST, "OMPI_VERSION": "4.1.4"},
        {**ONE_HOST, "OMPI_MCA_mpi_ft_enable": "1"},
        {**ONE_HOST, "HVDVAE_ENTERS": "1"},
        {},
    ):
        assert transports(several) is None
    assert transports({**ONE_HOST, "OMPI_MCA_btl": "tcp,self"}) == "tcp,self", "the user's own setting"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    assert transports(ONE_HOST) is None, "no room: TCP carries them"
