"""Both encoders as graphs that need neither JAX nor our modules: ONNX files, and programs of `torch.export`.

Of either encoder's first axis any size is taken. The volume encoder comes for HU as float32 and as int16; windowing,
projection and normalisation are inside. Texts come in as `tokenize` gives them (the format hf has that, and the tokenizer).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.interop import export_front_matter, export_preparation
from mg3d_jax.interop.export_check import check_close
from mg3d_jax.interop.export_format import MARKER, split_params, torch_config, torch_state
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.export_run import Run, phantom_inputs, reference_features

TEXT = ("input_ids", "attention_mask", "sentence_index")
VOLUME = "hounsfield"  # name of the graph's input
_CARD = """\
# {name}: both encoders as {what}

Step {step} of a run of mg3d_jax {version}. Embeddings of length 1, whose products are cosines; probability of a finding:
sigmoid({scale:.4g} * (cosine to "It is present." - cosine to "It is not present.")).

```python
{code}```

`volume_encoder` takes HU as float32, `volume_encoder_int16` as int16, [B, X, Y, Z] for any B, windowing inside. What brings
a scan to that grid stands in `preprocessor_config.json`, and as code in an export of the format hf. Texts: rows of {tokens}
tokens, as the processor of the format hf makes them. On phantom CT the embeddings differ from the JAX model's by at most
{difference:.1e}.

## Licence and data

{licence}
"""
_ONNX_CODE = """\
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("volume_encoder_int16.onnx")
(embedding,) = session.run(None, {{"hounsfield": np.zeros((2, {size}), np.int16)}})
"""
_EXPORT_CODE = """\
import torch

encode = torch.export.load("volume_encoder_int16.pt2").module()
embedding = encode(torch.zeros(2, {size}, dtype=torch.int16))
"""


def _modules(run: Run) -> tuple[Any, Any]:
    """Of PyTorch: `HU [B, X, Y, Z] -> [B, k]` and `(input_ids, attention_mask, sentence_index) [B, T] -> [B, k]`."""
    import torch
    from torch import nn

    from mg3d_jax.interop.torch_template.configuration_mg3d import MG3DConfig
    from mg3d_jax.interop.torch_template.modeling_mg3d import MG3DModel

    params, _ = split_params(run.params)
    kept = {name: part for name, part in params.items() if not name.startswith(("segmentation_", "report_decoder"))}
    kept.pop("classification_head", None)
    model = MG3DModel(MG3DConfig(**torch_config(run.config, kept, run.spacing, run.grid.policy))).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in torch_state(kept, run.config).items()})

    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, hounsfield: torch.Tensor) -> torch.Tensor:
            return self.model.get_image_features(hounsfield)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, sentence_index: torch.Tensor
        ) -> torch.Tensor:
            return self.model.get_text_features(input_ids, attention_mask, sentence_index)

    return Volume().eval(), Text().eval()


def _inputs(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Phantom volumes, tokens of their reports, and what the Linen model makes of both."""
    inputs = phantom_inputs(run.model_grid)
    expected = reference_features(run, inputs.volumes, inputs.reports)
    rows = [run.tokenizer(report) for report in inputs.reports]
    ours = dict(zip(TEXT, ("token_ids", "token_mask", "sentence_index"), strict=True))
    text = {name: np.stack([row[key] for row in rows]).astype(np.int64) for name, key in ours.items()}
    return inputs.volumes, text, {name: expected[name] for name in ("volume_embedding", "report_embedding")}


def _check(
    expected: dict[str, np.ndarray], volume: Callable[[np.ndarray], np.ndarray], int16: Callable[[np.ndarray], np.ndarray],
    text: Callable[[dict[str, np.ndarray]], np.ndarray], volumes: np.ndarray, tokens: dict[str, np.ndarray],
) -> float:  # fmt: skip
    """The largest difference, with batches of two sizes; `UserError` where it is too large."""
    found = {
        "volume_embedding": volume(volumes.astype(np.float32)),
        "report_embedding": text(tokens),
        "volume_embedding of one": volume(volumes[:1].astype(np.float32)),
        "volume_embedding of int16": int16(volumes),
    }
    wanted = expected | {
        "volume_embedding of one": expected["volume_embedding"][:1],
        "volume_embedding of int16": expected["volume_embedding"],
    }
    return max(check_close(wanted, found).values())


def _finish(run: Run, folder: Path, what: str, code: str, difference: float, requirements: tuple[str, ...]) -> None:
    size = ", ".join(map(str, run.config.model.volume_size))
    card = _CARD.format(
        name=run.config.name, what=what, step=run.step, version=__version__, code=code.format(size=size),
        scale=min(float(np.exp(run.params["logit_scale"])), 100.0), tokens=run.config.text_tokens(), difference=difference,
        licence=export_front_matter.licence_note(run),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    write_json(folder / "config.json", {MARKER: {"version": __version__, "step": run.step}})
    write_json(folder / "preprocessor_config.json", export_preparation.preprocessor_config(run, processor=False))
    export_front_matter.write_licence(run, folder, requirements)


def write_onnx(run: Run, folder: Path, extras: Extras) -> list[str]:
    """Writes `volume_encoder.onnx`, `volume_encoder_int16.onnx`, which share their weights, and `report_encoder.onnx`."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}, which is not installed here: pip install mg3d_jax[onnx]"
        ) from error
    import torch

    volumes, tokens, expected = _inputs(run)
    volume, text = _modules(run)
    batch = torch.export.Dim("batch")
    examples = torch.from_numpy(volumes[:2].astype(np.float32)), {n: torch.from_numpy(x[:2]) for n, x in tokens.items()}
    paths = {name: folder / f"{name}.onnx" for name in ("volume_encoder", "volume_encoder_int16", "report_encoder")}
    options: dict[str, Any] = {"dynamo": True, "external_data": True, "verbose": False}
    torch.onnx.export(
        volume, (examples[0],), paths["volume_encoder"], input_names=[VOLUME], output_names=["image_embeds"],
        dynamic_shapes=({0: batch},), **options,
    )  # fmt: skip
    torch.onnx.export(
        text, tuple(examples[1][name] for name in TEXT), paths["report_encoder"], input_names=list(TEXT),
        output_names=["text_embeds"], dynamic_shapes=({0: batch},) * len(TEXT), **options,
    )  # fmt: skip
    graph = onnx.load(str(paths["volume_encoder"]), load_external_data=False)
    onnx.save(_of_int16(graph, onnx), str(paths["volume_encoder_int16"]))

    def session(name: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
        opened = onnxruntime.InferenceSession(str(paths[name]), providers=["CPUExecutionProvider"])
        return lambda given: opened.run(None, given)[0]

    of_float, of_int16, of_text = map(session, paths)
    difference = _check(
        expected, lambda x: of_float({VOLUME: x}), lambda x: of_int16({VOLUME: x}), of_text, volumes, tokens
    )
    _finish(run, folder, "ONNX", _ONNX_CODE, difference, ("onnxruntime>=1.20", "numpy>=2.0,<3"))
    return [f"embeddings: JAX and onnxruntime differ by at most {difference:.1e}"]


def _of_int16(graph: Any, onnx: Any) -> Any:
    """The graph with int16 HU as its input, cast first. The weights stay in the file that both share."""
    (given,) = graph.graph.input
    for node in graph.graph.node:
        for number, name in enumerate(node.input):
            if name == VOLUME:
                node.input[number] = f"{VOLUME}_float"
    cast = onnx.helper.make_node("Cast", [VOLUME], [f"{VOLUME}_float"], to=onnx.TensorProto.FLOAT, name="from_int16")
    graph.graph.node.insert(0, cast)
    given.type.tensor_type.elem_type = onnx.TensorProto.INT16
    return graph


def write_torch_export(run: Run, folder: Path, extras: Extras) -> list[str]:
    """Writes `volume_encoder.pt2`, `volume_encoder_int16.pt2` and `report_encoder.pt2`."""
    import torch

    volumes, tokens, expected = _inputs(run)
    volume, text = _modules(run)
    batch = torch.export.Dim("batch")
    given = {
        "volume_encoder": (volume, (torch.from_numpy(volumes[:2].astype(np.float32)),)),
        "volume_encoder_int16": (volume, (torch.from_numpy(volumes[:2]),)),
        "report_encoder": (text, tuple(torch.from_numpy(tokens[name][:2]) for name in TEXT)),
    }
    loaded = {}
    for name, (module, example) in given.items():
        with torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=({0: batch},) * len(example))
        torch.export.save(program, folder / f"{name}.pt2")
        loaded[name] = torch.export.load(folder / f"{name}.pt2").module()

    def run_of(name: str) -> Callable[..., np.ndarray]:
        return lambda *arrays: loaded[name](*map(torch.from_numpy, arrays)).detach().numpy()

    difference = _check(
        expected, run_of("volume_encoder"), run_of("volume_encoder_int16"),
        lambda x: run_of("report_encoder")(*(x[name] for name in TEXT)), volumes, tokens,
    )  # fmt: skip
    _finish(run, folder, "programs of torch.export", _EXPORT_CODE, difference, ("torch>=2.6",))
    return [f"embeddings: JAX and torch.export differ by at most {difference:.1e}"]
