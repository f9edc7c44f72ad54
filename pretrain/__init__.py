"""Pre-training of encoders with MLM + SSO under DeepSpeed; run as `deepspeed pretrain/run.py`."""

import os

import torch

# DeepSpeed looks for an accelerator when it is imported, and prints a warning on stdout if there
# is none
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
