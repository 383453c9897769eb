#!/bin/bash
# Wheel and sdist in empty environments, with packages from the index, as a new user would: `make test-package`.
# Takes some minutes, mostly for torch. PYTHON names the interpreter.
set -euo pipefail
clone=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build
"$work/tools/bin/python" -m build --outdir "$work/dist" "$clone" > "$work/build.log"

cd "$work"
"$python" -m venv ordinary
ordinary/bin/pip install --quiet "$(echo dist/*.whl)[demo]"
ordinary/bin/rayprune --version
ordinary/bin/rayprune completion bash | bash -n
ordinary/bin/rayprune demo --out demo
ordinary/bin/rayprune verify demo/run
ordinary/bin/rayprune init demo/model --text demo/calibration.txt --aim balanced
ordinary/bin/rayprune validate job.yaml

"$python" -m venv from-source
from-source/bin/pip install --quiet --no-deps dist/*.tar.gz
test -f from-source/lib/python3*/site-packages/rayprune/specs/recipes/fast.yaml
echo "wheel and sdist work"
