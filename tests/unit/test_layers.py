"""The layers of the package: imports point down only, and MPI and Horovod are touched in few places."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvdvae

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hvdvae"

# Layer of each part: a file of the package's top folder, or a folder.
LAYERS = {
    "core": (
        "abort allocator batch checkpoint config config_check config_kinds config_named cores deadline deputy "
        "disturbance dtypes ema errors first_order flat flat_buffers flat_check flat_homes flat_layout flat_views "
        "launcher outcome quick_start regular_file schedule seeding signals supervisor version whole_file world",
        0,
    ),
    "domain": ("data vae", 1),
    "server and compression": ("compression ps", 2),
    "strategies": ("parallel strategies", 3),
    "run": (
        "averaged_statistics dataloader epoch_metrics heartbeat mean_loss monitor pulse pulse_served recovery resume "
        "run_folder run_record stepper trainer",
        4,
    ),
    "command": ("__main__ cli", 5),
}
LAYER = {part: layer for parts, layer in LAYERS.values() for part in parts.split()}

MAY_IMPORT_MPI4PY = {"world", "strategies", "parallel", "ps"}
MAY_IMPORT_HOROVOD = {"world", "strategies"}
# Beyond "down only": parts of one layer, or of lower ones, that must not know each other.
STRANGERS = {
    "data": {"vae", "world"},
    "vae": {"data", "world"},
    "compression": {"vae", "data", "world"},
    "ps": {"vae", "data"},
    "strategies": {"vae", "data"},
    "parallel": {"vae", "data"},
    "checkpoint": {"vae", "data"},
    "resume": {"vae", "data"},
    "pulse": {"vae", "data"},
    "monitor": {"vae", "data"},
    "stepper": {"vae", "data"},
    "trainer": {"vae", "data"},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run, also inside functions; not what only the type checker reads."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if only_for_types(node):
            assert isinstance(node, ast.If)
            for other in node.orelse:
                yield other
                yield from statements(other)
        else:
            yield from statements(node)


def imports(name: str, text: str, package: bool = False) -> set[str]:
    """Full names of the modules that a module imports."""
    found = set()
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".")[: len(name.split(".")) - node.level + package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from package import name` means the submodule where there is one, else what the package has.
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(base)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


GRAPH = {name: imports(name, file.read_text(), file.name == "__init__.py") for name, file in MODULES.items()}


def part_of(module: str) -> str:
    return [*module.split("."), ""][1]


def test_the_reader_of_imports_sees_all_kinds() -> None:
    text = """
import mpi4py.MPI
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import horovod
else:
    import tqdm
def later():
    from hvdvae import checkpoint, World
    from . import flat
    from .data.loader import Loader
    __import__("sklearn.datasets")
"""
    assert imports("hvdvae.ema", text) == {
        "mpi4py.MPI",
        "typing",
        "tqdm",
        "hvdvae.checkpoint",
        "hvdvae",
        "hvdvae.flat",
        "hvdvae.data.loader",
        "sklearn.datasets",
    }
    assert imports("hvdvae.data", "from . import loader", package=True) == {"hvdvae.data.loader"}
    assert len(MODULES) > 60
    assert "hvdvae.world" in GRAPH["hvdvae.pulse"], "the graph is empty"


def test_every_part_has_its_layer() -> None:
    unknown = {part_of(name) for name in MODULES} - LAYER.keys() - {""}
    assert not unknown, f"add {unknown} to the table of layers above"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    mine = part_of(name)
    for other in GRAPH[name]:
        if not other.startswith("hvdvae"):
            continue
        theirs = part_of(other)
        if theirs == "":  # The package itself has only its version, and names that are imported on use.
            assert LAYER.get(mine, 5) == 5, f"{name} imports from hvdvae itself: name the module"
            continue
        if (mine, theirs) == ("", "version"):
            continue
        assert mine != "", f"hvdvae/__init__.py imports {other} when it is imported: leave it to __getattr__"
        assert LAYER[theirs] <= LAYER[mine], f"{name} (layer {LAYER[mine]}) imports {other} (layer {LAYER[theirs]})"
        assert theirs not in STRANGERS.get(mine, set()), f"{name} must not know {other}"


@pytest.mark.parametrize(("library", "allowed"), [("mpi4py", MAY_IMPORT_MPI4PY), ("horovod", MAY_IMPORT_HOROVOD)])
def test_mpi_and_horovod_stay_where_they_belong(library: str, allowed: set[str]) -> None:
    users = {name for name, found in GRAPH.items() if any(module.split(".")[0] == library for module in found)}
    assert users, f"nobody imports {library}: this test has gone blind"
    assert {part_of(name) for name in users} <= allowed, users


def test_strategies_do_not_import_each_other() -> None:
    # Each stage of sharding is built on the one before.
    shared = {
        "strategy",
        "bucket_sums",
        "buckets",
        "checkpointed",
        "common_model",
        "flat_optimizer",
        "engine",
        "equal_options",
        "gradient_hooks",
        "left_alone",
        "group_options",
        "horovod_start",
        "mean",
        "messages",
        "optimizer_state",
        "parameter_states",
        "overlap",
        "own_step",
        "passes",
        "quiet_optimizer",
        "same_model",
        "run_member",
        "saved_optimizer",
        "sent_gradient",
        "sharded",
        "sharded_gradients",
        "shared_state",
        "sliced_step",
        "slices",
        "traffic",
        "wrapped",
        "wrapping",
    }
    for name, found in GRAPH.items():
        if name.startswith("hvdvae.strategies."):
            others = {module.split(".")[2] for module in found if module.startswith("hvdvae.strategies.")}
            assert others <= shared, f"{name} imports {others - shared}"


def test_there_are_no_cycles() -> None:
    """Also none through imports inside functions."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done or name not in GRAPH:
            return
        for other in sorted(GRAPH[name]):
            visit(other, (*path, name))
        done.add(name)

    for name in GRAPH:
        visit(name, ())
    assert done == set(MODULES)


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return {line.split(".")[0] for line in run.stdout.splitlines()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import hvdvae; hvdvae.__version__") & {"torch", "numpy", "mpi4py", "horovod", "tensorboard"}


def test_training_in_one_process_loads_neither_mpi_nor_horovod() -> None:
    code = """
import torch, hvdvae, hvdvae.trainer, hvdvae.vae, hvdvae.data
world = hvdvae.World.create(device="cpu")
for strategy in ("local", "allreduce"):
    model = torch.nn.Linear(2, 2)
    plain = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = hvdvae.DistributedOptimizer(plain, model, world=world, strategy=strategy)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
world.close()
"""
    found = loaded_by(
        f"import os\nfor name in list(os.environ):\n    name.startswith('OMPI_') and os.environ.pop(name)\n{code}"
    )
    assert "torch" in found
    assert not found & {"mpi4py", "horovod"}


def test_public_names_are_where_the_package_says() -> None:
    for name in hvdvae.__all__:
        assert getattr(hvdvae, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        hvdvae.nothing  # noqa: B018
