"""Softmax attention with one signature and several implementations ("backends").

`xla` is plain einsum attention with a float32 softmax; it runs everywhere and is what the others are tested against.
`cudnn` is the fused flash kernel of NVIDIA GPUs. `auto` is resolved by `choose_backend`, which also says why.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError

BACKENDS = ("auto", "xla", "cudnn")


def choose_backend(requested: str, platform: str, dtype: str, head_dim: int) -> tuple[str, str]:
    """Resolves the configured backend to one that runs here.

    Args:
        requested: one of `BACKENDS`.
        platform: "cpu", "gpu" or "tpu": where the step will run.
        dtype: the compute dtype, "float32" or "bfloat16".
        head_dim: width of one attention head.

    Returns:
        The backend's name (never "auto") and the reason, for the table printed at start.

    Raises:
        UserError: the backend is unknown, or was asked for and cannot run here.
    """
    if requested not in BACKENDS:
        raise UserError(f"attention_backend={requested!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    obstacle = _cudnn_obstacle(platform, dtype, head_dim)
    if requested == "cudnn" and obstacle:
        raise UserError(f"attention_backend='cudnn' cannot run: {obstacle}. Use 'auto' or 'xla'.")
    if requested != "auto":
        return requested, "asked for"
    if platform == "gpu" and not obstacle:
        return "cudnn", "fused kernel of this GPU"
    return "xla", f"cudnn cannot run: {obstacle}"


def _cudnn_obstacle(platform: str, dtype: str, head_dim: int) -> str | None:
    if platform != "gpu":
        return f"the platform is {platform}, it needs a gpu"
    if dtype not in ("bfloat16", "float16"):
        return f"the compute dtype is {dtype}, it needs bfloat16"
    if head_dim % 8 or head_dim > 128:
        return f"a head is {head_dim} wide, it needs a multiple of 8, at most 128"
    return None


def attention_weights(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax weights [B, H, Tq, Tk] in float32; `query` and `key` are [B, T, H, head_dim], `mask` [B, Tk] or None.

    A row without any valid key gets uniform weights (not NaN): callers zero such rows where they matter.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, backend: str = "xla"
) -> jax.Array:
    """Attention output [B, Tq, H, head_dim].

    Args:
        query: [B, Tq, H, head_dim].
        key, value: [B, Tk, H, head_dim].
        mask: bool [B, Tk], True where a key may be read; None: all of them.
        backend: "xla" or "cudnn" (resolve "auto" with `choose_backend` first).
    """
    if backend == "xla":
        weights = attention_weights(query, key, mask)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    if backend == "cudnn":
        full_mask = None if mask is None else mask[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=full_mask, implementation="cudnn")
    raise UserError(f"attention backend {backend!r} is not one that runs; resolve it with choose_backend.")
