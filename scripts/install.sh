#!/usr/bin/env bash
# Creates .venv beside this project and installs it with its development tools; does nothing where that is done already.
#   PYTHON=python3.11 bash scripts/install.sh     picks the interpreter (3.10 to 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=".venv/installed-$(sha256sum pyproject.toml | cut -c1-16)"
if [ -f "$stamp" ]; then
  exit 0
fi
python=${PYTHON:-python3}
"$python" - <<'CHECK'
import sys
if not (3, 10) <= sys.version_info[:2] < (3, 13):
    sys.exit(f"Python {sys.version.split()[0]} found; accepted: 3.10 to 3.12. Choose another with PYTHON=...")
CHECK
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "Installing into .venv (torch first: some packages would otherwise pull another build of it)"
.venv/bin/python -m pip install --quiet "torch>=2.6,<2.14"
.venv/bin/python -m pip install --quiet -e ".[dev]"
touch "$stamp"
