"""MG-3D: multi-grained 3D CT and report pre-training in JAX. See README.md; `mg3d --help` lists the commands."""

__version__ = "0.2.0.dev0"
