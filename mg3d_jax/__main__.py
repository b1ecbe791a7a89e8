"""`python -m mg3d_jax` is `mg3d`."""

from mg3d_jax.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
