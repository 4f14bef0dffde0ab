"""What gpu_check.py does: parts that measure, each guarded and timed, and the page made of their record."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))  # whose modules know one another by name
