"""A sheet of Pathfinder images: `python lra/pathfinder_sheet.py lra/pathfinder32_hard.png`."""

import argparse
import random
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lra.chunks import chunk_random
from lra.pathfinder import TARGET_LENGTHS, Difficulty, draw_scene, pathfinder_spec
from ponet.checkpoint import write_atomically

_ROWS, _COLUMNS = 2, 8


def _tiles(size: int, difficulty: Difficulty, label: int, rng: random.Random) -> np.ndarray:
    """Images of one label side by side, with a gap between them."""
    images = []
    while len(images) < _ROWS * _COLUMNS:
        scene = draw_scene(pathfinder_spec(size, difficulty), rng)
        if scene.label == label:
            images.append(np.pad(scene.render(), 1, constant_values=255))
    rows = [images[row * _COLUMNS : (row + 1) * _COLUMNS] for row in range(_ROWS)]
    return np.block(rows)


def draw_sheet(path: Path, *, size: int, difficulty: Difficulty, seed: int) -> None:
    """Draw 16 images of each label.

    Args:
        path: the PNG to write.
        size: of the images in pixels.
        difficulty: as `pathfinder_spec` takes it.
        seed: of the images.
    """
    rng = chunk_random(seed, 0)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    titles = {1: "label 1: both discs on one path", 0: "label 0: discs on two paths"}
    for axes, (label, title) in zip(figure.subplots(2, 1), titles.items(), strict=True):
        tiles = _tiles(size, difficulty, label, rng)
        axes.imshow(tiles, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=9)
        axes.axis("off")
    write_atomically(path, partial(figure.savefig, format="png", dpi=150))


def main() -> None:
    """Draw the sheet that the command line asks for."""
    parser = argparse.ArgumentParser(description="draw a sheet of generated Pathfinder images")
    parser.add_argument("path", type=Path, help="the PNG to write")
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side [32]")
    parser.add_argument("--difficulty", choices=TARGET_LENGTHS, default="hard", help="[hard]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images [0]")
    arguments = vars(parser.parse_args())
    draw_sheet(arguments.pop("path"), **arguments)


if __name__ == "__main__":
    main()
