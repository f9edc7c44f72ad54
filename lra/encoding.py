"""From source texts and images to ids, as the published input pipelines make them."""

import numpy as np

LISTOPS_TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
"""Their ids are 1, 2, ... in this order, ours: the published one is that of an unordered set and
differs from run to run."""

_LISTOPS_IDS = {token: number for number, token in enumerate(LISTOPS_TOKENS, start=1)}
# the nesting in pairs says nothing that the brackets do not
_NO_PARENTHESES = str.maketrans("", "", "()")

_GREY_WEIGHTS = np.array([0.2989, 0.5870, 0.1140], np.float32)


def encode_listops(source: str, max_tokens: int) -> np.ndarray:
    """Ids of an expression without its parentheses.

    Args:
        source: operators, digits, brackets and parentheses, separated by blanks.
        max_tokens: what is longer is cut.

    Returns:
        `[tokens]`, uint8, 1 to 15.

    Raises:
        ValueError: a token is none of the task's.
    """
    tokens = source.translate(_NO_PARENTHESES).split()
    try:
        ids = bytes([_LISTOPS_IDS[token] for token in tokens])
    except KeyError as error:
        raise ValueError(f"token {error.args[0]!r}, expected {' '.join(LISTOPS_TOKENS)}") from None
    return np.frombuffer(ids, np.uint8)[:max_tokens]


def encode_bytes(text: bytes, max_tokens: int) -> np.ndarray:
    """Ids of a text, one a byte: the byte plus one, because 0 is padding.

    Args:
        text: UTF-8, or whatever the file holds.
        max_tokens: what is longer is cut.

    Returns:
        `[tokens]`, uint16, 1 to 256.
    """
    return np.frombuffer(text[:max_tokens], np.uint8).astype(np.uint16) + np.uint16(1)


def grey_levels(images: np.ndarray) -> np.ndarray:
    """Grey images by the formula of TensorFlow's `rgb_to_grayscale`, which rounds down.

    Args:
        images: `[..., 3]`, uint8, red, green and blue.

    Returns:
        `[...]`, uint8.
    """
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    # white gives 0.9999, and 255.5 brings it back to 255
    return ((scaled @ _GREY_WEIGHTS) * np.float32(255.5)).astype(np.uint8)
