"""Transformer pieces shared by both towers and the fusion: attention, MLP, block, scanned stack, remat policies.

Parameters are float32 and carry logical axis names ("embed", "heads", "mlp", ...); the compute dtype is an argument;
softmax and normalisation statistics are float32 whatever the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError
from mg3d_jax.models.attention import attention_weights, dot_product_attention

part = nn.with_logical_partitioning
constrain = nn.with_logical_constraint

# Scaled by the fan, as in ViT and big_vision: BERT's fixed 0.02 starves the residual branches of narrow towers.
KERNEL_INIT = nn.initializers.xavier_uniform()
TABLE_INIT = nn.initializers.truncated_normal(stddev=0.02)
ACTIVATION_AXES = ("batch", "length", "embed")
REMAT_POLICIES = ("none", "minimal", "full", "offload")


def dense(
    features: int, axes: tuple[str | None, str | None], dtype: str, name: str | None = None, use_bias: bool = True
) -> nn.Dense:
    """A Dense layer whose kernel carries the logical axes `axes` (in, out). In `setup` the attribute names it."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.float32,
        kernel_init=part(KERNEL_INIT, axes),
        bias_init=part(nn.initializers.zeros_init(), axes[1:]),
        name=name,
    )


def layer_norm(
    dtype: str, name: str | None = None, epsilon: float = 1e-6, axis: str = "embed", use_bias: bool = True
) -> nn.LayerNorm:
    """LayerNorm over the last axis: float32 statistics, output in the compute dtype."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.float32,
        use_bias=use_bias,
        use_fast_variance=False,
        scale_init=part(nn.initializers.ones_init(), (axis,)),
        bias_init=part(nn.initializers.zeros_init(), (axis,)),
        name=name,
    )


class Attention(nn.Module):
    """Multi-head attention; self-attention when `q_in` and `kv_in` are the same array.

    `__call__(q_in [B, Tq, d], kv_in [B, Tk, e], mask bool [B, Tk] or None) -> [B, Tq, d]`. `qk_norm` normalises each
    head's queries and keys (Dehghani et al. 2023), which keeps large models stable. With the `xla` backend the weights
    [B, H, Tq, Tk] can be read by `apply(..., mutable="intermediates")` under the name "attention".
    """

    num_heads: int
    dtype: str = "float32"
    qk_norm: bool = False
    backend: str = "xla"
    use_bias: bool = True

    @nn.compact
    def __call__(self, q_in: jax.Array, kv_in: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = q_in.shape[-1]
        if width % self.num_heads:
            raise UserError(f"width {width} is not divisible by num_heads {self.num_heads}.")
        head_dim = width // self.num_heads

        def heads(name: str, inputs: jax.Array) -> jax.Array:
            flat = dense(width, ("embed", "heads"), self.dtype, name, self.use_bias)(inputs)
            flat = constrain(flat, ("batch", "length", "heads"))
            return flat.reshape(*flat.shape[:2], self.num_heads, head_dim)

        query, key, value = heads("query", q_in), heads("key", kv_in), heads("value", kv_in)
        if self.qk_norm:
            query = layer_norm(self.dtype, "query_norm", axis="head_dim", use_bias=False)(query)
            key = layer_norm(self.dtype, "key_norm", axis="head_dim", use_bias=False)(key)
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "attention", attention_weights(query, key, mask))
        mixed = dot_product_attention(query, key, value, mask, self.backend)
        mixed = constrain(mixed.reshape(*q_in.shape[:2], width), ("batch", "length", "heads"))
        return dense(width, ("heads", "embed"), self.dtype, "out", self.use_bias)(mixed)


class Mlp(nn.Module):
    """Two dense layers with a GELU between: [B, T, d] -> [B, T, d]. `exact_gelu` is the erf form (BERT)."""

    hidden: int
    dtype: str = "float32"
    exact_gelu: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        hidden = dense(self.hidden, ("embed", "mlp"), self.dtype, "up")(inputs)
        hidden = constrain(nn.gelu(hidden, approximate=not self.exact_gelu), ("batch", "length", "mlp"))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return dense(inputs.shape[-1], ("mlp", "embed"), self.dtype, "down")(hidden)


class LayerScale(nn.Module):
    """Learned per-channel scale of a residual branch (Touvron et al. 2021), started at `initial`."""

    initial: float

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        scale = self.param("scale", part(nn.initializers.constant(self.initial), ("embed",)), (inputs.shape[-1],))
        return inputs * scale.astype(inputs.dtype)


class Block(nn.Module):
    """One self-attention layer: `(x [B, T, d], mask bool [B, T] or None, train) -> [B, T, d]`.

    `norm_position` "pre" is the ViT (x + f(norm(x))), "post" is BERT (norm(x + f(x))). Dropout acts on the two residual
    branches; attention probabilities are never dropped, because the fused attention kernels cannot.
    """

    num_heads: int
    mlp_dim: int
    dtype: str = "float32"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-6
    exact_gelu: bool = False
    qk_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    attention_backend: str = "xla"

    @nn.compact
    def __call__(self, inputs: jax.Array, mask: jax.Array | None = None, train: bool = False) -> jax.Array:
        attention = Attention(self.num_heads, self.dtype, self.qk_norm, self.attention_backend, name="attention")
        mlp = Mlp(self.mlp_dim, self.dtype, self.exact_gelu, name="mlp")
        inputs = self._residual(inputs, lambda x: attention(x, x, mask), "attention", train)
        return self._residual(inputs, mlp, "mlp", train)

    def _residual(
        self, inputs: jax.Array, branch: Callable[[jax.Array], jax.Array], name: str, train: bool
    ) -> jax.Array:
        norm = layer_norm(self.dtype, f"{name}_layer_norm", self.norm_epsilon)
        pre = self.norm_position == "pre"
        change = branch(norm(inputs) if pre else inputs)
        if self.layer_scale is not None:
            change = LayerScale(self.layer_scale, name=f"{name}_scale")(change)
        change = nn.Dropout(self.dropout)(change, deterministic=not train)
        total = inputs + change
        return constrain(total if pre else norm(total), ACTIVATION_AXES)


def make_remat(
    policy: str, train_argument: int = 3, scanned: bool = True
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """What the backward pass keeps of each scanned layer, by name: a wrapper for module classes.

    "none" keeps everything; "minimal" keeps the outputs of the dense layers and recomputes attention, norms and GELU;
    "offload" keeps the same arrays, but in host memory; "full" keeps only the layer's input.

    Args:
        policy: one of `REMAT_POLICIES`.
        train_argument: position of the static argument `train` in `__call__` (0 is the module).
        scanned: the module runs inside `nn.scan`, which already prevents common-subexpression elimination.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return lambda module: module
    if policy == "minimal":
        saved = policies.checkpoint_dots_with_no_batch_dims
    elif policy == "offload":
        saved = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    elif policy == "full":
        saved = policies.nothing_saveable
    else:
        raise UserError(f"remat={policy!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}.")
    return partial(nn.remat, policy=saved, prevent_cse=not scanned, static_argnums=(train_argument,))


_BLOCK_FIELDS = (
    "num_heads",
    "mlp_dim",
    "dtype",
    "norm_position",
    "norm_epsilon",
    "exact_gelu",
    "qk_norm",
    "layer_scale",
    "dropout",
    "attention_backend",
)


class _ScanBody(nn.Module):
    """One layer of the stack. The module that the scan repeats is a level above `Block`, for its name's sake."""

    block: dict

    @nn.compact
    def __call__(self, inputs: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        return Block(**self.block, name="block")(inputs, mask, train)


class Stack(nn.Module):
    """`depth` equal blocks, scanned, so that tracing and compiling cost the same for 12 layers as for 48.

    `__call__(x [B, T, d], mask bool [B, T] or None, train) -> [B, T, d]`; with `hidden` beside it what every layer gave,
    [depth, B, T, d]. Parameters lie under `blocks/block` with a leading "layers" axis. The first `frozen_layers` of them
    (-1: all) are run without dropout and behind `stop_gradient`: no backward pass is spent on them, nothing is kept for one,
    and the gradient of their part of each array is zero. Parameters are the same whatever is frozen. Intermediates can be
    read where nothing is.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    dtype: str = "float32"
    norm_position: str = "pre"
    norm_epsilon: float = 1e-6
    exact_gelu: bool = False
    qk_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    attention_backend: str = "xla"
    remat: str = "none"
    frozen_layers: int = 0

    @nn.compact
    def __call__(
        self, inputs: jax.Array, mask: jax.Array | None = None, train: bool = False, hidden: bool = False
    ) -> Any:
        frozen = frozen_count(self.frozen_layers, self.depth)
        body = _ScanBody({field: getattr(self, field) for field in _BLOCK_FIELDS}, name="blocks")
        if self.is_initializing() or not frozen:
            outputs, states = self._scan(body, None, inputs, mask, train, hidden=hidden)
            return (outputs, states) if hidden else outputs

        def part_of(params: dict, layers: slice) -> dict:
            return jax.tree.map(lambda stacked: stacked[layers], params)

        def cut(params: dict) -> dict:
            return jax.lax.stop_gradient(part_of(params, slice(0, frozen)))

        inputs = jax.lax.stop_gradient(inputs)
        outputs, states = jax.lax.stop_gradient(self._scan(body, cut, inputs, mask, False, frozen, hidden))
        if frozen < self.depth:
            rest = partial(part_of, layers=slice(frozen, self.depth))
            outputs, more = self._scan(body, rest, outputs, mask, train, self.depth - frozen, hidden)
            states = jnp.concatenate([states, more]) if hidden else None
        return (outputs, states) if hidden else outputs

    def _scan(
        self,
        body: _ScanBody,
        choose: Callable[[dict], dict] | None,
        inputs: jax.Array,
        mask: jax.Array | None,
        train: bool,
        length: int | None = None,
        hidden: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """All layers of `body`, whose parameters are stacked, or the `length` that `choose` takes of them. With `hidden`
        also what each of them gave, [length, B, T, d]."""

        def one(body: _ScanBody, inputs: jax.Array, mask: jax.Array | None, train: bool) -> tuple[jax.Array, Any]:
            outputs = body(inputs, mask, train)
            return outputs, outputs if hidden else None

        scanned = nn.scan(
            make_remat(self.remat)(one),
            variable_axes={"params": 0} if choose else {"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=length or self.depth,
            in_axes=(nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if choose:
            scanned = nn.map_variables(scanned, "params", choose)
        return scanned(body, inputs, mask, train)


def frozen_count(frozen_layers: int, depth: int) -> int:
    """How many layers `frozen_layers` freezes: itself, or all for -1. `UserError` outside -1..depth."""
    if not -1 <= frozen_layers <= depth:
        raise UserError(f"frozen_layers={frozen_layers} must lie between 0 and the depth, {depth}, or be -1 for all.")
    return depth if frozen_layers == -1 else frozen_layers
