"""Which types sums run in and which types indices are kept in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def argmax_dtype(longest: int) -> torch.dtype:
    """Smallest integer type for an argmax, 0 to `longest` - 1, in a segment."""
    if longest <= 2**8:
        return torch.uint8
    return torch.int16 if longest <= 2**15 else torch.int32
