"""A run's model as graphs that need neither JAX nor our modules: ONNX files, and programs of `torch.export`.

Of every graph's first axis any size is taken. Graphs of volumes come for HU as float32 and as int16; windowing, projection and
normalisation are inside. Texts come in as `tokenize` gives them (the format hf has that, and the tokenizer). What a run was
fine-tuned for goes along: logits of its classification head, of its voxels, of the next token of a report. Loops around them
(sliding windows, writing token after token) stay with the receiver.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.interop import export_format, export_front_matter, export_preparation
from mg3d_jax.interop.export_check import SHARES, check_close, sigmoid, softmax
from mg3d_jax.interop.export_format import MARKER, split_params, torch_config, torch_state
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.export_run import Run, phantom_inputs, reference_features

TEXT = ("input_ids", "attention_mask", "sentence_index")
VOLUME = "hounsfield"  # the input of graphs of volumes
LENGTH = "length"  # the second axis that a graph takes in any size
Arrays = dict[str, np.ndarray]
_CARD = """\
# {name}: {what}

Step {step} of a run of mg3d_jax {version}.

| graph | takes | gives |
|---|---|---|
{rows}

```python
{code}```

`hounsfield` is [B, X, Y, Z] for any B, windowing inside; graphs of volumes come as `_int16`, too. What brings a scan to that
grid stands in `preprocessor_config.json`, and as code in an export of the format hf. Texts: rows of {tokens} tokens, as the
processor of the format hf makes them; `tokenizer.json` is here. `image_embeds` and `text_embeds` have length 1, so that
products are cosines; probability of a finding:
sigmoid({scale:.4g} * (cosine to "It is present." - cosine to "It is not present.")).
{tasks}
Of phantom CT and reports, all outputs differ from the JAX model's by at most {difference:.1e} (logits as probabilities).

## Licence and data

{licence}
"""
_HEAD = "`classification_logits` are of {classes} ({kind}).\n"
_SEGMENTS = (
    "`segmentation_logits` [B, K, X, Y, Z] are of {classes}, for one window; larger scans in overlapping windows, e.g.\n"
    'MONAI\'s `sliding_window_inference(..., overlap=0.5, mode="gaussian", cval=-1024)`.\n'
)
_WRITES = (
    "`report_decoder` gives logits [B, L, V] of what follows each of the tokens that were written, from [CLS] on:\nappend the "
    "likeliest, again and again, until it is [SEP]. `last_hidden_state` is made once for a volume.\n"
)
_READS_FINDINGS = (
    "`findings` int8 [B, F]: which of the classes above there are, 1 present, 0 absent, -1 unknown; by default those whose\n"
    "`classification_logits` are above 0.\n"
)
_ONNX_CODE = """\
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("volume_encoder_int16.onnx")
(embedding,) = session.run(["image_embeds"], {{"hounsfield": np.zeros((2, {size}), np.int16)}})
"""
_EXPORT_CODE = """\
import torch

encode = torch.export.load("volume_encoder_int16.pt2").module()
embedding = encode(torch.zeros(2, {size}, dtype=torch.int16))["image_embeds"]
"""


@dataclass(frozen=True)
class Graph:
    """One graph.

    Args:
        module: of PyTorch, which returns a dict of its outputs.
        inputs: of phantoms, in the order of its arguments; the first axis is the batch.
        expected: its outputs, as the Linen model gives them.
        any_length: inputs whose second axis may have any size, too, up to `longest`.
    """

    name: str
    module: Any
    inputs: Arrays
    expected: Arrays
    any_length: tuple[str, ...] = ()
    longest: int = 0

    @property
    def of_hounsfield(self) -> bool:
        """Does it take HU, as float32? Then there is an `_int16` one as well."""
        return VOLUME in self.inputs

    def rows(self) -> str:
        """Of the card's table."""
        takes = ", ".join(f"`{name}`" for name in self.inputs)
        return f"| `{self.name}` | {takes} | {', '.join(f'`{name}`' for name in self.expected)} |"


def _model(run: Run) -> Any:
    """The exported model of PyTorch, with all heads of the run."""
    import torch

    from mg3d_jax.interop.torch_template.configuration_mg3d import MG3DConfig
    from mg3d_jax.interop.torch_template.modeling_mg3d_tasks import MG3DTaskModel

    params, _ = split_params(run.params)
    arguments = torch_config(run.config, params, run.spacing, run.grid.policy)
    arguments |= export_format.head_arguments(run.config, params, run.label_names)
    arguments |= export_format.task_arguments(run.config, params, run.mask_names)
    model = MG3DTaskModel(MG3DConfig(**arguments)).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in torch_state(params, run.config).items()})
    return model


def _modules(model: Any) -> dict[str, Any]:
    """Modules by the names of their graphs: of a run without decoders, the two encoders."""
    import torch
    from torch import nn

    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, hounsfield: torch.Tensor) -> dict[str, torch.Tensor]:
            tokens, pooled = self.model._encode(hounsfield)
            outputs = {"image_embeds": self.model._volume_embedding(pooled), "last_hidden_state": tokens}
            if self.model.config.head_classes:
                outputs["classification_logits"] = self.model.classification_head(pooled)
            return outputs

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, sentence_index: torch.Tensor
        ) -> dict[str, torch.Tensor]:
            return {"text_embeds": self.model.get_text_features(input_ids, attention_mask, sentence_index)}

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, hounsfield: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"segmentation_logits": self.model.segmentation_logits(hounsfield)}

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = model.report_decoder

        def forward(
            self, last_hidden_state: torch.Tensor, written: torch.Tensor, findings: torch.Tensor | None = None
        ) -> dict[str, torch.Tensor]:
            volumes = [layer.read(last_hidden_state) for layer in self.decoder.layers]
            return {"next_token_logits": self.decoder(written, volumes, findings=findings)[0]}

    found: dict[str, Any] = {"volume_encoder": Volume(), "report_encoder": Text()}
    if model.config.segmentation_classes:
        found["segmenter"] = Segmenter()
    if model.config.decoder_depth:
        found["report_decoder"] = Decoder()
    return {name: module.eval() for name, module in found.items()}


def _graphs(run: Run) -> list[Graph]:
    """With phantoms, and what the Linen model makes of them."""
    inputs = phantom_inputs(run.model_grid)
    found = reference_features(run, inputs.volumes, inputs.reports)
    rows = [run.tokenizer(report) for report in inputs.reports]
    ours = dict(zip(TEXT, ("token_ids", "token_mask", "sentence_index"), strict=True))
    text = {name: np.stack([row[key] for row in rows]).astype(np.int64) for name, key in ours.items()}
    volumes = {VOLUME: inputs.volumes.astype(np.float32)}
    modules = _modules(_model(run))
    outputs = {"image_embeds": found["volume_embedding"], "last_hidden_state": found["volume_tokens"]}
    if export_format.HEAD in run.params:
        outputs["classification_logits"] = found["classification_logits"]
    graphs = [
        Graph("volume_encoder", modules["volume_encoder"], volumes, outputs),
        Graph("report_encoder", modules["report_encoder"], text, {"text_embeds": found["report_embedding"]}),
    ]
    if "segmenter" in modules:
        logits = np.moveaxis(found["segmentation_logits"], -1, 1)
        graphs.append(Graph("segmenter", modules["segmenter"], volumes, {"segmentation_logits": logits}))
    if "report_decoder" in modules:
        written = text["input_ids"][: len(inputs.volumes), : run.config.data.max_tokens][:, :-1]
        given: Arrays = {"last_hidden_state": found["volume_tokens"].astype(np.float32), "written": written}
        if "findings" in found:
            given["findings"] = found["findings"]
        expected = {"next_token_logits": found["next_token_logits"]}
        graphs.append(
            Graph(
                "report_decoder",
                modules["report_decoder"],
                given,
                expected,
                ("written",),
                run.config.data.max_tokens - 1,
            )
        )
    return graphs


Runs = Callable[[Arrays], Mapping[str, np.ndarray]]


def _check(graph: Graph, floats: Runs, int16: Runs | None) -> float:
    """The largest difference, with batches of two sizes; `UserError` where it is too large."""
    first = {name: array[:1] for name, array in graph.inputs.items()}
    short = {name: array[:, :3] if name in graph.any_length else array for name, array in first.items()}
    of_short = {name: array[:1, :3] if graph.any_length else array[:1] for name, array in graph.expected.items()}
    pairs = [(graph.expected, floats(graph.inputs)), (of_short, floats(short))]
    if int16:
        pairs.append((graph.expected, int16({VOLUME: graph.inputs[VOLUME].astype(np.int16)})))
    return max(max(check_close(_comparable(wanted), _comparable(found)).values()) for wanted, found in pairs)


def _comparable(outputs: Mapping[str, np.ndarray]) -> Arrays:
    """Logits have no scale of their own: as probabilities."""
    found = dict(outputs)
    if (logits := found.pop("segmentation_logits", None)) is not None:
        found[SHARES] = softmax(np.moveaxis(logits, 1, -1))
    if "next_token_logits" in found:
        found["next_token_logits"] = softmax(found["next_token_logits"])
    if "classification_logits" in found:
        found["classification_logits"] = sigmoid(found["classification_logits"])
    return found


def _finish(
    run: Run, folder: Path, what: str, code: str, difference: float, graphs: list[Graph], needs: tuple[str, ...]
) -> None:
    config, names = run.config, {graph.name for graph in graphs}
    size, tasks = ", ".join(map(str, config.model.volume_size)), ""
    if export_format.HEAD in run.params:
        head = export_format.head_arguments(config, run.params, run.label_names)
        tasks += _HEAD.format(classes=", ".join(head["head_classes"]), kind=head["head_kind"])
    if "segmenter" in names:
        tasks += _SEGMENTS.format(classes=", ".join(export_format.mask_classes(config, run.mask_names)))
    tasks += _WRITES if "report_decoder" in names else ""
    tasks += _READS_FINDINGS if any("findings" in graph.inputs for graph in graphs) else ""
    card = _CARD.format(
        name=config.name, what=what, step=run.step, version=__version__, code=code.format(size=size),
        rows="\n".join(graph.rows() for graph in graphs), tasks=tasks and f"\n{tasks}",
        scale=min(float(np.exp(run.params["logit_scale"])), 100.0), tokens=config.text_tokens(), difference=difference,
        licence=export_front_matter.licence_note(run),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    shutil.copyfile(run.tokenizer_folder / "tokenizer.json", folder / "tokenizer.json")
    write_json(folder / "config.json", {MARKER: {"version": __version__, "step": run.step}})
    write_json(folder / "preprocessor_config.json", export_preparation.preprocessor_config(run, processor=False))
    export_front_matter.write_licence(run, folder, needs)


def _tensors(graph: Graph) -> tuple[tuple[Any, ...], tuple[dict[int, Any], ...]]:
    """Arguments to trace with, a batch of two, and which of their axes may have any size."""
    import torch

    batch = torch.export.Dim("batch")
    length = torch.export.Dim(LENGTH, max=graph.longest) if graph.any_length else None
    axes = tuple({0: batch, 1: length} if name in graph.any_length else {0: batch} for name in graph.inputs)
    return tuple(torch.from_numpy(array[:2].copy()) for array in graph.inputs.values()), axes


def write_onnx(run: Run, folder: Path, extras: Extras) -> list[str]:
    """Writes `NAME.onnx` of every graph, and `NAME_int16.onnx`, which shares its weights, of those that take HU."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}, which is not installed here: pip install mg3d_jax[onnx]"
        ) from error
    import torch

    def session(name: str) -> Runs:
        opened = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        names = [output.name for output in opened.get_outputs()]
        return lambda given: dict(zip(names, opened.run(names, given), strict=True))

    graphs, difference = _graphs(run), 0.0
    for graph in graphs:
        arguments, axes = _tensors(graph)
        path, int16 = folder / f"{graph.name}.onnx", None
        torch.onnx.export(
            graph.module, arguments, path, input_names=list(graph.inputs), output_names=list(graph.expected),
            dynamic_shapes=axes, dynamo=True, external_data=True, verbose=False,
        )  # fmt: skip
        if graph.of_hounsfield:
            made = _of_int16(onnx.load(str(path), load_external_data=False), onnx)
            onnx.save(made, str(folder / f"{graph.name}_int16.onnx"))
            int16 = session(f"{graph.name}_int16")
        difference = max(difference, _check(graph, session(graph.name), int16))
    _finish(run, folder, "ONNX graphs", _ONNX_CODE, difference, graphs, ("onnxruntime>=1.20", "numpy>=2.0,<3"))
    return [f"{', '.join(graph.name for graph in graphs)}: JAX and onnxruntime differ by at most {difference:.1e}"]


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
    """Writes `NAME.pt2` of every graph, and `NAME_int16.pt2` of those that take HU."""
    import torch

    def saved(name: str, module: Any, arguments: tuple[Any, ...], axes: tuple[dict[int, Any], ...]) -> Runs:
        with torch.no_grad():
            program = torch.export.export(module, arguments, dynamic_shapes=axes)
        torch.export.save(program, folder / f"{name}.pt2")
        loaded = torch.export.load(folder / f"{name}.pt2").module()

        def run_it(given: Arrays) -> Arrays:
            outputs = loaded(*map(torch.from_numpy, given.values()))
            return {key: tensor.detach().numpy() for key, tensor in outputs.items()}

        return run_it

    graphs, difference = _graphs(run), 0.0
    for graph in graphs:
        arguments, axes = _tensors(graph)
        floats = saved(graph.name, graph.module, arguments, axes)
        short = tuple(argument.short() for argument in arguments)
        int16 = saved(f"{graph.name}_int16", graph.module, short, axes) if graph.of_hounsfield else None
        difference = max(difference, _check(graph, floats, int16))
    _finish(run, folder, "programs of torch.export", _EXPORT_CODE, difference, graphs, ("torch>=2.6",))
    return [f"{', '.join(graph.name for graph in graphs)}: JAX and torch.export differ by at most {difference:.1e}"]
