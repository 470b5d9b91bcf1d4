"""What a researcher writes first: two thin SVDs a pair with torch, on whole checkpoints in memory. The yardstick.

Threads are torch's own choice, or what OMP_NUM_THREADS says.

python tests/benchmarks/_plain_loop.py BASE TUNED
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file

base, tuned = load_file(sys.argv[1]), load_file(sys.argv[2])
total = 0.0
for name, W in base.items():
    if W.ndim == 2:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        total += float(torch.linalg.svd(tuned[name], full_matrices=False).S.sum() - S.sum())
print(total)
