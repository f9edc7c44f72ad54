"""Speed and memory of the operators, the models and the input pipeline; programs of this checkout.

Each program runs as `python benchmarks/PROGRAM.py` from any folder after `pip install -e .`.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# threads that wait for each other by spinning take many times as long where cores are shared
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
