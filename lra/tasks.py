"""The tasks of the Long Range Arena (arXiv 2011.04006) with their published settings.

The settings are those of the code behind the Nystromformer (arXiv 2102.03902) and PoNet
(arXiv 2110.02442) comparisons, which are the same for every token mixer.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["published", "clean"]
"""How examples reach the model (`lra.model`), and what a model is selected on (`lra.store`)."""


@dataclass(frozen=True, kw_only=True)
class ArenaTask:
    """One task: its examples, the model that reads them, and how that model is trained."""

    name: str
    kind: Literal["tokens", "pixels"]
    """Whether id 0 is padding (`tokens`) or a black pixel (`pixels`: an id is a grey level)."""
    num_inputs: int = 1
    max_tokens: int
    """Longest input; what is longer is cut."""
    seq_len: int
    """Length the model is built for; the published protocol pads every input to it."""
    vocab_size: int = 512
    class_names: tuple[str, ...]
    split_sizes: tuple[int, int, int]
    """Published numbers of training, development and test examples."""
    dev_from: Literal["source", "train", "test"]
    """Where the published development set comes from: a file of its own, a part of the training
    set, or (Text) it is the test set."""
    is_generated: bool = False
    batch_size: int
    learning_rate: float = 1e-4
    """Peak of the schedule, after `warmup_steps`."""
    warmup_steps: int
    steps: int
    eval_every: int
    """Steps between evaluations on the development set, of `eval_batches` batches."""
    eval_batches: int
    num_segments: int
    """PoNet's segments: a segment has `seq_len // num_segments + 1` tokens."""
    mask_ratio: float
    """Share of tokens hidden in self-pretraining (arXiv 2310.02980)."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def mask_id(self) -> int:
        """Id of a hidden token in self-pretraining; no input holds it."""
        return self.vocab_size - 1


_LISTOPS = ArenaTask(
    name="listops",
    kind="tokens",
    max_tokens=2000,
    seq_len=2048,
    vocab_size=32,
    class_names=tuple("0123456789"),
    split_sizes=(96_000, 2_000, 2_000),
    dev_from="source",
    is_generated=True,
    batch_size=32,
    warmup_steps=1000,
    steps=5000,
    eval_every=50,
    eval_batches=62,
    num_segments=64,
    mask_ratio=0.10,
)
_TEXT = ArenaTask(
    name="text",
    kind="tokens",
    max_tokens=4000,
    seq_len=4096,
    class_names=("negative", "positive"),
    split_sizes=(25_000, 25_000, 25_000),
    dev_from="test",
    batch_size=32,
    warmup_steps=8000,
    steps=20_000,
    eval_every=500,
    eval_batches=781,
    num_segments=4096,
    mask_ratio=0.15,
)
_RETRIEVAL = ArenaTask(
    name="retrieval",
    kind="tokens",
    num_inputs=2,
    max_tokens=4000,
    seq_len=4096,
    class_names=("unrelated", "citing"),
    split_sizes=(147_086, 18_090, 17_437),
    dev_from="source",
    batch_size=32,
    warmup_steps=800,
    steps=30_000,
    eval_every=300,
    eval_batches=565,
    num_segments=64,
    mask_ratio=0.15,
)
_IMAGE = ArenaTask(
    name="image",
    kind="pixels",
    max_tokens=1024,
    seq_len=1024,
    class_names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    split_sizes=(45_000, 5_000, 10_000),
    dev_from="train",
    batch_size=256,
    warmup_steps=175,
    steps=35_000,
    eval_every=175,
    eval_batches=20,
    num_segments=32,
    mask_ratio=0.50,
)
_PATHFINDER = ArenaTask(
    name="pathfinder",
    kind="pixels",
    max_tokens=32 * 32,
    seq_len=32 * 32,
    class_names=("apart", "connected"),
    split_sizes=(160_000, 20_000, 20_000),
    dev_from="source",
    is_generated=True,
    batch_size=256,
    warmup_steps=312,
    steps=62_400,
    eval_every=312,
    eval_batches=312,
    num_segments=1,
    mask_ratio=0.50,
)
# the published comparison has no row for Path-X: no run of it is a reproduction
_PATHX = dataclasses.replace(_PATHFINDER, name="pathx", max_tokens=128**2, seq_len=128**2)

TASKS = {t.name: t for t in (_LISTOPS, _TEXT, _RETRIEVAL, _IMAGE, _PATHFINDER, _PATHX)}

COMPARED: tuple[str, ...] = ("listops", "text", "retrieval", "image", "pathfinder")
"""The tasks of the published table; "all" stands for them."""


def tasks_named(names: Iterable[str]) -> list[ArenaTask]:
    """Tasks by name, each once; "all" stands for those of `COMPARED`."""
    expanded = [n for name in names for n in (COMPARED if name == "all" else (name,))]
    return [TASKS[name] for name in dict.fromkeys(expanded)]
