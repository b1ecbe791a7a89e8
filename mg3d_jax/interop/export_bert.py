"""A run's report encoder as a folder for `transformers.AutoModel` without any code of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.interop import export_front_matter, export_preparation
from mg3d_jax.interop.export_check import check_close
from mg3d_jax.interop.export_format import MARKER
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.export_run import Run, phantom_inputs, reference_features

_CARD = """\
# {name}: the report encoder, a {architecture}

Step {step} of a run of mg3d_jax {version}: features of tokens. Pooling over sentences and the projection into the space that
it shares with volumes are not part of it; the format hf has them.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(".", add_pooling_layer=False)
tokenizer = AutoTokenizer.from_pretrained(".")
tokens = model(**tokenizer(["No pleural effusion."], return_tensors="pt")).last_hidden_state
```

On reports, the features differ from those of the JAX model by at most {difference:.1e}.

## Licence and data

{licence}
"""


def write(run: Run, folder: Path, extras: Extras) -> list[str]:
    """Writes `config.json`, weights and tokenizer; `UserError` where transformers' model gives other features."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModel

    convert = run.config.model.report_encoder.tower.to_hugging_face
    if convert is None:
        raise UserError(f"this run's report_encoder is a {run.config.model.report_encoder.kind}, which is no BERT")
    config, state = convert(run.params["report_encoder"], run.config.model)
    about = {MARKER: {"version": __version__, "step": run.step}}
    special = run.tokenizer.special
    write_json(folder / "config.json", config | {"pad_token_id": special["[PAD]"]} | about)
    arrays = {name: np.asarray(array, np.float32, order="C") for name, array in sorted(state.items())}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    for file in sorted(run.tokenizer_folder.iterdir()):
        shutil.copyfile(file, folder / file.name)
    told = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", export_preparation.tokenizer_config(run, told))
    inputs = phantom_inputs(run.model_grid)
    expected = reference_features(run, inputs.volumes, inputs.reports)["report_tokens"]
    rows = [run.tokenizer(report) for report in inputs.reports]
    ids, mask = (np.stack([row[name] for row in rows]) for name in ("token_ids", "token_mask"))
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).float().eval()
    with torch.no_grad():
        found = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    difference = check_close({"report_tokens": expected[mask]}, {"report_tokens": found[mask]})["report_tokens"]
    card = _CARD.format(
        name=run.config.name, architecture=config["architectures"][0], step=run.step, version=__version__,
        difference=difference, licence=export_front_matter.licence_note(run),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    export_front_matter.write_licence(run, folder, ("torch>=2.6", "transformers>=4.50,<6", "safetensors>=0.5,<1"))
    return [f"{json.dumps(config['architectures'][0])}: JAX and transformers differ by at most {difference:.1e}"]
