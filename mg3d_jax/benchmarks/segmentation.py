"""`mg3d bench segmentation`: a training step and sliding-window inference of UNETR, beside MONAI's on the same machine.

Both have the same layers and see the same numbers of voxels. A step is the forward and backward pass with Dice and
cross-entropy (no optimizer, no data); inference is of one whole volume, windows blended by a Gaussian. Each contestant runs
in its own process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mg3d_jax.benchmarks.own_process import in_own_process
from mg3d_jax.benchmarks.towers import DTYPES, REMATS, time_steps
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.models.towers.vit import PRESETS

CLASSES, PATCH, LAYERS = 2, 16, 12  # MONAI's UNETR has patches of 16 and 12 layers
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """What is timed. `framework` is a key of `WORKERS`."""

    framework: str
    preset: str
    window: Size
    volume: Size
    width: int
    batch: int
    windows: int
    overlap: float
    steps: int
    dtype: str
    remat: str


def parser() -> argparse.ArgumentParser:
    """Options of `mg3d bench segmentation`."""
    twelve = [name for name, sizes in PRESETS.items() if sizes.depth == LAYERS]
    found = argparse.ArgumentParser(
        prog="mg3d bench segmentation",
        description="A step and sliding-window inference of UNETR, beside MONAI's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    found.add_argument("--preset", default="b", choices=twelve, help="size of the ViT")
    found.add_argument("--window", type=int, nargs=3, default=[96, 96, 96], metavar=("X", "Y", "Z"))
    found.add_argument("--volume", type=int, nargs=3, default=[192, 192, 160], metavar=("X", "Y", "Z"))
    found.add_argument("--width", type=int, default=16, help="channels at full resolution")
    found.add_argument("--batch", type=int, default=2, help="crops per step")
    found.add_argument("--windows", type=int, default=4, help="windows per call of the network")
    found.add_argument("--overlap", type=float, default=0.5, help="of windows, a share of their size")
    found.add_argument("--steps", type=int, default=3, help="timed repetitions after the first; the median counts")
    found.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype of both")
    found.add_argument("--remat", choices=REMATS, default="none", help="what our backward pass keeps")
    found.add_argument("--no-monai", action="store_true", help="time ours only")
    found.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    return found


def main(argv: list[str]) -> int:
    """Times both, prints a line for each and the ratios."""
    args = parser().parse_args(argv)
    if min(args.batch, args.steps, args.windows, args.width) < 1:
        raise UserError("--batch, --steps, --windows and --width must be at least 1")
    if any(side % PATCH for side in args.window):
        raise UserError(f"--window {args.window} is not divisible by {PATCH} on each axis")
    options = {name: value for name, value in vars(args).items() if name not in ("no_monai", "json")}
    options |= {"window": tuple(args.window), "volume": tuple(args.volume)}
    results = {}
    print(f"{'by':<6} {'ms/step':>10} {'ms/volume':>10} {'first step s':>13} {'first volume s':>15}", flush=True)
    for framework in ("jax",) if args.no_monai else ("jax", "monai"):
        one = results[framework] = in_own_process(Case(framework, **options))
        line = f"{framework:<6} {1000 * one['step']['seconds']:>10.1f} {1000 * one['volume']['seconds']:>10.1f}"
        first = [one[name]["first_step_seconds"] for name in ("step", "volume")]
        print(f"{line} {first[0]:>13.1f} {first[1]:>15.1f}", flush=True)
    print(f"device: {results['jax']['device']}; dtype {args.dtype}; remat {args.remat}")
    if "monai" in results:
        ratios = [results["monai"][name]["seconds"] / results["jax"][name]["seconds"] for name in ("step", "volume")]
        print(f"{ratios[0]:.2f} times the speed of MONAI's UNETR in a step, {ratios[1]:.2f} times in inference")
    if args.json:
        write_json(args.json, {"case": options, "results": results})
    return 0


def time_jax(case: Case) -> dict[str, Any]:
    """Our towers and decoder."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from mg3d_jax.evaluation.sliding_window import SlidingWindow, sliding_window
    from mg3d_jax.models.segmentation import UnetrDecoder
    from mg3d_jax.models.towers.vit.encoder import VolumeEncoder
    from mg3d_jax.tasks.segmentation import SegmentationOptions, dice_cross_entropy

    sizes, patch, common = PRESETS[case.preset], (PATCH,) * 3, {"dtype": case.dtype, "remat": case.remat}
    shape = (sizes.width, sizes.depth, sizes.num_heads, patch, case.window)
    encoder = VolumeEncoder(*shape, mlp_ratio=sizes.mlp_ratio, pooling="mean", **common)
    decoder, head = UnetrDecoder(patch, case.width, **common), nn.Dense(CLASSES)

    class Network(nn.Module):
        def setup(self) -> None:
            self.parts = (encoder.clone(), decoder.clone(), head.clone())

        def __call__(self, crops: Any) -> Any:
            encode, decode, classify = self.parts
            volume = crops[..., None]
            return classify(decode(volume, encode(volume, hidden=True)).astype(jnp.float32))

    network, key = Network(), jax.random.key(0)
    crops = jax.random.uniform(key, (case.batch, *case.window))
    mask = jax.random.randint(key, crops.shape, 0, CLASSES, jnp.int8)
    params = nn.unbox(jax.jit(network.init)(key, crops))
    options, known = SegmentationOptions(num_classes=CLASSES), jnp.ones(crops.shape, bool)
    gradient = jax.jit(jax.grad(lambda p: dice_cross_entropy(network.apply(p, crops), mask, known, options)[0]))
    windows = SlidingWindow(case.window, case.overlap, case.windows)
    infer = jax.jit(lambda p, volume: sliding_window(partial(network.apply, p), volume, windows, 0.0))
    volume = jax.random.uniform(key, (1, *case.volume))
    return {
        "device": jax.devices()[0].device_kind,
        "step": time_steps(lambda: jax.block_until_ready(gradient(params)), case.steps),
        "volume": time_steps(lambda: jax.block_until_ready(infer(params, volume)), case.steps),
    }


def time_monai(case: Case) -> dict[str, Any]:
    """MONAI's UNETR, loss and inferer, with PyTorch's fused attention; on a GPU compiled by `torch.compile`."""
    try:
        import torch
        from monai.inferers import sliding_window_inference
        from monai.losses import DiceCELoss
        from monai.networks.nets import UNETR
    except ImportError as error:
        raise UserError(f"the comparison needs torch, monai and einops ({error}); or say --no-monai.") from error
    sizes = PRESETS[case.preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA multiplies float32 there
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    widths = {"hidden_size": sizes.width, "mlp_dim": sizes.mlp_dim, "num_heads": sizes.num_heads}
    model = UNETR(1, CLASSES, case.window, feature_size=case.width, qkv_bias=True, **widths).to(device)
    for block in model.vit.blocks:
        block.attn.use_flash_attention = True  # MONAI has the option, but its UNETR does not pass it on
    run: Callable[..., Any] = torch.compile(model) if device.type == "cuda" else model
    crops = torch.rand(case.batch, 1, *case.window, device=device)
    mask = torch.randint(0, CLASSES, crops.shape, device=device)
    volume, loss = torch.rand(1, 1, *case.volume, device=device), DiceCELoss(to_onehot_y=True, softmax=True)
    cast = partial(torch.autocast, device.type, torch.bfloat16, enabled=case.dtype == "bfloat16")

    def done() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with cast():
            logits = run(crops)
        loss(logits.float(), mask).backward()
        done()

    @torch.inference_mode()
    def infer() -> None:
        with cast():
            sliding_window_inference(volume, case.window, case.windows, run, overlap=case.overlap, mode="gaussian")
        done()

    step_times = time_steps(step, case.steps)
    model.eval()
    return {"device": str(device), "step": step_times, "volume": time_steps(infer, case.steps)}


WORKERS: dict[str, Callable[[Case], dict[str, Any]]] = {"jax": time_jax, "monai": time_monai}
