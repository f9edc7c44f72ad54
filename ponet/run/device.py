"""Time, memory and arithmetic of a run."""

import ctypes
import resource
import subprocess
import time
from pathlib import Path

import torch

from ponet.config import PoNetConfig


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards covers its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """What ran: the name of the GPU, or the CPU with this process's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def return_free_memory(device: torch.device) -> None:
    """Give memory that is free inside the process back to the system.

    The C library's heap cannot reuse all the holes that tensors of ever other sizes leave: over
    hours of ragged batches on a CPU a process would grow many times over what it needs.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def training_flops(config: PoNetConfig, tokens: int, labelled: int, seq_len: int) -> float | None:
    """Floating-point operations of a masked-LM training step; None: no formula for the mixer.

    Two per multiply-add, backward counted as twice forward. Per token and layer, with C the width,
    F the feed-forward width, H the heads and N the length: 2 C F in every model; the Transformer
    4 C^2 for projections and 2 N C for scores and mixing; PoNet 4 C^2 for projections of tokens
    and 2 H C for global aggregation; FNet nothing more, transforms are not counted. Per labelled
    token C^2 + C V. What fused attention computes again in the backward pass is not counted.
    """
    c, f = config.hidden_size, config.intermediate_size
    pooled = (2 + config.use_segment + config.use_local) * c * c
    if config.use_global and config.use_global_second_stage:
        pooled += 2 * config.num_attention_heads * c
    attention = 4 * c * c + 2 * seq_len * c
    mixing = {"ponet": pooled, "fnet": 0, "attention": attention, "attention_naive": attention}
    if config.mixer not in mixing:
        return None
    layers = config.num_hidden_layers * (mixing[config.mixer] + 2 * c * f)
    return 6.0 * (tokens * layers + labelled * (c * c + c * config.vocab_size))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a product of square matrices, by default 8192 wide on a GPU and 2048 on a CPU."""
    n = size or (8192 if device.type == "cuda" else 2048)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        torch.matmul(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def source_commit() -> str:
    """The commit of the checkout this package runs from, "-dirty" with changes, or "unknown"."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()
