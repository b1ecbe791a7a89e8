#!/usr/bin/env bash
# Puts the oldest transformers of our range, with what it needs of its time, into a folder beside the installed one.
# bash launch/old_transformers.sh [FOLDER]    (default .venvs/old_transformers in the checkout)
#
#   PYTHON  for which Python (default: python3)
#
# MG3D_OLD_TRANSFORMERS=FOLDER lets tests/test_interop_export.py use it (so does the default folder), and
# tests/export_matrix.py --transformers FOLDER compares all kinds of models.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-$PWD/.venvs/old_transformers}
oldest=$(grep -oE 'transformers>=[0-9.]+' requirements.txt | cut -d= -f2)
"${PYTHON:-python3}" -m pip install -q --upgrade --no-deps --target "$folder" \
  "transformers==$oldest.0" 'huggingface_hub<1' 'tokenizers==0.21.4' requests urllib3 charset_normalizer idna certifi
echo "$folder: transformers $oldest.0"
