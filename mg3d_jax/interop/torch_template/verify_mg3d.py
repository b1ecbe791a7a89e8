"""Is this folder whole, and does it compute here what it computed where it was made?

    python verify_mg3d.py

Compares the SHA-256 of every file, then reads `example.nii.gz`, a synthetic chest, and two texts, and compares their embeddings
and the zero-shot probabilities with those in `verification.json`. Exit code 0: all agree.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROBABILITIES = 50  # a cosine is multiplied by up to 100 before it becomes a probability


def damaged(expected: dict[str, str]) -> list[str]:
    """Files that are missing or differ."""
    found = {name: FOLDER / name for name in expected}
    return [name for name, path in found.items() if not path.is_file() or sha256(path) != expected[name]]


def sha256(path: Path) -> str:
    """Of the content of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> int:
    """Prints what was compared."""
    told = json.loads((FOLDER / "verification.json").read_text())
    if wrong := damaged(told["sha256"]):
        print(f"not as exported: {', '.join(wrong)}: get the folder again")
        return 1
    print(f"{len(told['sha256'])} files are as exported")
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).float().eval()
    example = str(FOLDER / "example.nii.gz")
    with torch.no_grad():
        found = {
            "volume_embedding": model.encode_volume(model.image_processor(example)["pixel_values"]),
            "text_embeddings": model.encode_texts(told["texts"]),
        }
    if "zero_shot" in told:
        found["zero_shot"] = torch.tensor(list(model.zero_shot(example, list(told["zero_shot"])).values()))
        told["zero_shot"] = list(told["zero_shot"].values())
    differs = False
    for name, values in found.items():
        difference = float((values - torch.tensor(told[name])).abs().max())
        tolerance = told["tolerance"] * (PROBABILITIES if name == "zero_shot" else 1)
        differs |= not difference <= tolerance
        print(f"{name}: differs by {difference:.1e} (at most {tolerance:.0e})")
    print("not what was exported: report the versions of torch and transformers" if differs else "verified")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
