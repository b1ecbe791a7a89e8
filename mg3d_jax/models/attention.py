"""Softmax attention with one signature and several implementations ("backends").

`xla` is plain einsum attention with a float32 softmax; it runs everywhere and is what the others are tested against.
`cudnn` is the fused flash kernel of NVIDIA GPUs, `splash` the Pallas flash kernel of TPUs: neither keeps the [Tq, Tk]
matrix. `auto` is resolved by `choose_backend`, which also says why; nothing falls back silently.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError

BACKENDS = ("auto", "xla", "cudnn", "splash")
FUSED = {"gpu": "cudnn", "tpu": "splash"}


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
        raise UserError(f"model.attention={requested!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    if requested != "auto":
        if obstacle := _obstacle(requested, platform, dtype, head_dim):
            raise UserError(f"model.attention={requested!r} cannot run: {obstacle}. Use 'auto' or 'xla'.")
        return requested, "asked for"
    fused = FUSED.get(platform)
    if fused is None:
        return "xla", f"there is no fused kernel for {platform}"
    if obstacle := _obstacle(fused, platform, dtype, head_dim):
        return "xla", f"{fused} cannot run: {obstacle}"
    return fused, f"fused kernel for {platform}"


def _obstacle(backend: str, platform: str, dtype: str, head_dim: int) -> str | None:
    """Why `backend` cannot run there, or None."""
    home = {name: place for place, name in FUSED.items()}.get(backend, platform)
    if platform != home:
        return f"the platform is {platform}, it needs a {home}"
    if backend == "cudnn" and dtype != "bfloat16":
        return f"the compute dtype is {dtype}, it needs bfloat16"
    if backend == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"a head is {head_dim} wide, it needs a multiple of 8, at most 128"
    return None


def attention_weights(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Softmax weights [B, H, Tq, Tk], float32, of `query` and `key` [B, T, H, head_dim]; `mask` [B, Tk], [B, Tq, Tk] or None.

    A row without any valid key gets uniform weights (not NaN): callers zero such rows where they matter.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, backend: str = "xla"
) -> jax.Array:
    """Attention output [B, Tq, H, head_dim].

    Args:
        query: [B, Tq, H, head_dim].
        key, value: [B, Tk, H, head_dim].
        mask: bool [B, Tk], True where a key may be read, or, for "xla" only, [B, Tq, Tk]; None: all of them.
        backend: "xla", "cudnn" or "splash" (resolve "auto" with `choose_backend` first).
    """
    if backend == "xla":
        weights = attention_weights(query, key, mask)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    if backend == "cudnn":
        return cudnn_attention(query, key, value, mask)
    if backend == "splash":
        from mg3d_jax.models.attention_tpu import splash_attention

        return splash_attention(query, key, value, mask)
    raise UserError(f"attention backend {backend!r} is not one that runs; resolve it with choose_backend.")


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, implementation: str = "cudnn"
) -> jax.Array:
    """The kernel behind `jax.nn.dot_product_attention`; `implementation="xla"` is its twin for tests.

    With a mask, cuDNN's backward pass wants even lengths: odd ones get one masked position more.
    """
    if mask is None:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    queries, keys = query.shape[1], key.shape[1]
    query, key, value = _even(query), _even(key), _even(value)
    mask = jnp.pad(mask, ((0, 0), (0, key.shape[1] - keys)))
    mask = jnp.broadcast_to(mask[:, None, None, :], (mask.shape[0], 1, query.shape[1], key.shape[1]))
    output = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
    return output[:, :queries]


def _even(array: jax.Array) -> jax.Array:
    """[B, T, H, head_dim] with T rounded up to an even number."""
    return jnp.pad(array, ((0, 0), (0, array.shape[1] % 2), (0, 0), (0, 0)))
