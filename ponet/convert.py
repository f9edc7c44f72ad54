"""Names of parameters: ours <-> those of published PoNet checkpoints.

The published layout (257 entries for pre-training) is what we write too, so that a model folder is
read by either code. Entries that repeat others (`position_ids`, the tied decoder) are not written.
"""

import re

from torch import Tensor

# (ours, published), first match wins; the encoder's names carry the prefix "ponet."
_RENAMES = (
    (r"ponet\.embeddings\.norm\.", "ponet.embeddings.LayerNorm."),
    (r"ponet\.embeddings\.(word|position|token_type)\.", r"ponet.embeddings.\1_embeddings."),
    (
        r"ponet\.encoder\.layers\.(\d+)\.mixer\.query\.",
        r"ponet.encoder.layer.\1.attention.self.dense_q.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.mixer\.key\.",
        r"ponet.encoder.layer.\1.attention.self.dense_k.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.mixer\.output\.",
        r"ponet.encoder.layer.\1.attention.self.dense_o.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.mixer\.segment\.",
        r"ponet.encoder.layer.\1.attention.self.dense_segment.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.mixer\.local\.",
        r"ponet.encoder.layer.\1.attention.self.dense_local.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.mixer\.dense\.",
        r"ponet.encoder.layer.\1.attention.output.dense.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.mixer_norm\.",
        r"ponet.encoder.layer.\1.attention.output.LayerNorm.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.feed_forward\.up\.",
        r"ponet.encoder.layer.\1.intermediate.dense.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.feed_forward\.down\.",
        r"ponet.encoder.layer.\1.output.dense.",
    ),
    (
        r"ponet\.encoder\.layers\.(\d+)\.feed_forward_norm\.",
        r"ponet.encoder.layer.\1.output.LayerNorm.",
    ),
    (r"ponet\.encoder\.final_norm\.", "ponet.encoder.LayerNorm."),
    (r"ponet\.pooler\.", "ponet.pooler.dense."),
    (r"mlm_head\.dense\.", "cls.predictions.transform.dense."),
    (r"mlm_head\.norm\.", "cls.predictions.transform.LayerNorm."),
    (r"mlm_head\.decoder\.weight", "cls.predictions.decoder.weight"),
    (r"mlm_head\.decoder\.bias", "cls.predictions.bias"),
    (r"sso_head\.", "cls.seq_relationship."),
)

# entries of published files that say nothing new
_REPEATED = ("ponet.embeddings.position_ids", "cls.predictions.decoder.bias")


def published_name(name: str) -> str:
    """The published name of our parameter `name`; a name of no published part stays as it is."""
    for ours, published in _RENAMES:
        renamed, count = re.subn(f"^{ours}", published, name)
        if count:
            return renamed
    return name


def published_entries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the entries of any published file to one form.

    Args:
        state: entries of a whole model or of a bare encoder (no "ponet." in front of the names).

    Returns:
        Entries as in a file of a whole model, repeated ones left out.
    """
    bare = any(name.startswith("embeddings.") for name in state)
    entries = {f"ponet.{name}" if bare else name: tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in entries.items() if name not in _REPEATED}
