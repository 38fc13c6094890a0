"""What Open MPI is asked for before it starts."""

from hvdvae.world.settings import prefer

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
