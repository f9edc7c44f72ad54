"""Give the parameters of a model folder their published names, for the published PoNet code.

    python -m ponet.convert runs/small/model published/

Loading needs no conversion: `from_pretrained` takes either form.
"""

import argparse
import shutil
import sys
from pathlib import Path

from ponet.checkpoint import CONFIG, CheckpointError, published_name, read_weights, write_weights

_COPIED = (CONFIG, "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def write_published(source: Path, target: Path) -> None:
    """Write any model folder in the published form, with its configuration and tokenizer."""
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target}: expected another folder than the one that is read")
    entries = read_weights(source)
    write_weights(target, {published_name(name): tensor for name, tensor in entries.items()})
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def main() -> None:
    """Convert the folder that the command line names."""
    parser = argparse.ArgumentParser(description="write a model folder with published names")
    parser.add_argument("source", type=Path, help="model folder to read")
    parser.add_argument("target", type=Path, help="folder to write")
    chosen = parser.parse_args()
    try:
        write_published(chosen.source, chosen.target)
    except (CheckpointError, OSError) as error:
        sys.exit(f"ponet.convert: {error}")


if __name__ == "__main__":
    main()
