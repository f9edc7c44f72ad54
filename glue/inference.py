"""What a classifier says of all rows of a split."""

from typing import Literal

import numpy as np
import torch

from glue.batches import batches_of_all, collect
from glue.encoding import EncodedRows
from ponet import PoNetForSequenceClassification
from ponet.run.trainer import autocast

Precision = Literal["fp32", "bf16"]

_MAX_TOKENS = 16_384


@torch.inference_mode()
def outputs_of(
    model: PoNetForSequenceClassification, rows: EncodedRows, precision: Precision = "fp32"
) -> np.ndarray:
    """Logits, or the numbers of a regression.

    Args:
        model: put into evaluation mode.
        rows: N examples.
        precision: arithmetic.

    Returns:
        `[N, num_labels]` float32, in the order of the rows.
    """
    model.eval()
    device = next(model.parameters()).device
    outputs = np.empty((len(rows), model.config.num_labels), dtype=np.float32)
    batches = batches_of_all(rows.lengths, _MAX_TOKENS)
    logits = []
    for indices in batches:
        inputs = collect(rows, indices, model.config).to(device)
        # no answer is in question here
        inputs.pop("labels", None)
        with autocast(precision, device):
            logits.append(model(**inputs).logits.float())
    # read at the end: it waits for the device
    outputs[np.concatenate(batches)] = torch.cat(logits).cpu().numpy()
    return outputs


def predictions_of(outputs: np.ndarray) -> np.ndarray:
    """Classes `[N]` int64 from logits, or numbers `[N]` float64 from a regression's outputs."""
    if outputs.shape[1] == 1:
        return outputs[:, 0].astype(np.float64)
    return outputs.argmax(axis=1)
