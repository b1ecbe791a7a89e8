"""Everything about the package is in pyproject.toml, but for `configs/`: it stays at the top and travels in the wheel."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["mg3d_jax", "mg3d_jax.*"]),
        "mg3d_jax.configs",
        *(f"mg3d_jax.configs.{name}" for name in find_namespace_packages("configs")),
    ],
    package_dir={"mg3d_jax.configs": "configs"},
)
