"""All that a pre-training run is told: fields, presets, and what contradicts what."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from ponet.checkpoint import read_model
from ponet.config import BlockSettings, PoNetConfig
from ponet.run.cli import UsageError, parse_arguments, read_yaml, require, require_at_least
from ponet.tokenizer import SpecialTokens, load_tokenizer
from pretrain.examples import OBJECTIVES, ExampleSettings

PRESETS = Path(__file__).with_name("configs")

# what a resumed run may change: nothing that alters examples or their order, and of what alters
# weights the number of steps alone, with a warning where the schedule depends on it
_FREE_ON_RESUME = {"resume", "num_workers", "log_every", "keep_checkpoints", "steps"}

_AT_LEAST = dict.fromkeys(["steps", "batch_tokens", "micro_batch_tokens", "log_every"], 1)
_AT_LEAST |= dict.fromkeys(["eval_every", "keep_checkpoints"], 1)
_AT_LEAST |= dict.fromkeys(["warmup_steps", "num_workers", "max_grad_norm", "weight_decay"], 0)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(BlockSettings):
    """Settings of a pre-training run; the defaults are those of no preset in particular."""

    data: tuple[str, ...] = ("builtin",)
    """Where text comes from: files or folders (.txt .jsonl .parquet, also .gz .xz), data sets of
    the hub (wikitext, wikipedia, org/name:config), or builtin, the documentation in Python."""
    text_field: str = "text"
    """Field of JSONL records or column of parquet files that holds the text."""
    max_characters: int | None = None
    """Stop reading after this many characters; None: read all."""
    validation_fraction: float = 0.02
    """Share of the documents held out for evaluation."""
    checkpoint: str | None = None
    """PoNet, BERT or FNet to go on from, a folder or a name on the hub: architecture, weights and
    tokenizer, its position table repeated to --seq-len; None: new weights."""
    vocab: str | None = None
    """A tokenizer.json, a BERT vocab.txt, or a folder with one; None: that of --checkpoint, or one
    trained on the data."""
    vocab_size: int = 8192
    """Entries of a trained vocabulary."""
    cache_dir: str = "~/.cache/ponet"
    """Folder of tokenised data."""
    preprocessing_workers: int = 0
    """Processes that tokenise besides this one; they pay for themselves on gigabytes of text."""
    mixer: str = "ponet"
    """Token mixer."""
    hidden_size: int = 256
    """Width of the hidden states."""
    num_hidden_layers: int = 4
    """Encoder layers."""
    num_attention_heads: int = 4
    """Heads of global aggregation."""
    intermediate_size: int = 1024
    """Width inside the feed-forward sub-layer."""
    dropout: float = 0.1
    """Dropout probability."""
    attention_probs_dropout_prob: float = 0.0
    """Dropout of attention probabilities in mixers that have them; published BERT: 0.1."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights. BERT's 0.02 belongs to a width of 768; what a layer
    adds to the residual stays the same at other widths with 0.02 * sqrt(768 / width)."""
    seq_len: int = 512
    """Longest example in tokens, special tokens included."""
    objective: Literal["mlm+sso", "mlm+nsp", "mlm"] = "mlm+sso"
    """Masked LM with sentence structure (3 classes), with next sentence (2 classes), or alone."""
    mask_probability: float = 0.15
    """Share of the tokens to predict."""
    short_sequence_probability: float = 0.1
    """Share of the examples with a random shorter length."""
    steps: int = 1000
    """Optimizer steps."""
    batch_tokens: int = 8192
    """Tokens of a global batch: what all processes see in one optimizer step."""
    micro_batch_tokens: int = 8192
    """Tokens that a process computes at once; divides batch_tokens."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up: linear decay to zero at the last step, or constant."""
    weight_decay: float = 0.01
    """AdamW's decay of weight matrices; biases and LayerNorm are not decayed."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean."""
    adam_beta2: float = 0.999
    """AdamW's decay of the variance."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    precision: Literal["fp32", "bf16", "bf16-residual", "fp16"] = "fp32"
    """Arithmetic: fp32; bf16 autocast with fp32 weights; the same with the residual stream in bf16
    too, LayerNorm statistics in fp32; or fp16 with loss scaling (GPU only)."""
    compile: bool | None = None
    """Compile encoder layers; None: on a GPU."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage, 0 to 2."""
    deepspeed_config: str | None = None
    """DeepSpeed's JSON: what the engine alone owns, such as bucket sizes; None:
    pretrain/deepspeed.json."""
    output_dir: str | None = None
    """Folder of the run, new or empty; None: runs/<preset>-<time>."""
    resume: str | None = None
    """Folder of a run to continue from its newest undamaged checkpoint, with its settings."""
    seed: int = 0
    """Seed of weights, examples and dropout."""
    log_every: int = 10
    """Steps between lines of the log."""
    eval_every: int = 200
    """Steps between evaluations, each followed by a checkpoint."""
    eval_tokens: int = 100_000
    """Tokens of held-out text in an evaluation."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the one with the lowest evaluation loss stays too."""
    num_workers: int = 0
    """Processes that draw examples, in each rank; 0: the rank itself."""

    def __post_init__(self) -> None:
        require_at_least(self, _AT_LEAST)
        stage, fraction = self.zero_stage, self.validation_fraction
        require(stage in (0, 1, 2), "zero_stage", "0, 1 or 2", stage)
        require(0 < fraction < 1, "validation_fraction", "between 0 and 1", fraction)
        window = self.local_window
        require(window > 0 and window % 2 == 1, "local_window", "odd and at least 1", window)
        for name in ("dropout", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            require(0 <= value < 1, name, "at least 0 and below 1", value)
        tokens, micro = self.batch_tokens, self.micro_batch_tokens
        multiple = f"a multiple of --micro-batch-tokens {micro}"
        require(tokens % micro == 0, "batch_tokens", multiple, tokens)
        length = f"at least --seq-len {self.seq_len}"
        require(micro >= self.seq_len, "micro_batch_tokens", length, micro)

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a global batch, over all processes and accumulation steps."""
        return self.batch_tokens // self.micro_batch_tokens

    @property
    def arithmetic(self) -> str:
        """Of autocast: fp32, bf16 or fp16."""
        return self.precision.removesuffix("-residual")

    def model_config(self, vocab_size: int, pad: int, cls: int, sep: int) -> PoNetConfig:
        """The model for a vocabulary with these special tokens; fields of one name are the same."""
        names = {field.name for field in dataclasses.fields(PoNetConfig)} - {"vocab_size"}
        same = {name: value for name, value in vars(self).items() if name in names}
        return PoNetConfig(
            **same,
            vocab_size=vocab_size,
            hidden_dropout_prob=self.dropout,
            max_position_embeddings=self.seq_len,
            pad_token_id=pad,
            cls_token_id=cls,
            sep_token_id=sep,
            num_sentence_labels=OBJECTIVES[self.objective],
        )

    def example_settings(self, tokenizer: Tokenizer) -> ExampleSettings:
        """How examples are drawn for a tokenizer."""
        special = SpecialTokens.from_tokenizer(tokenizer)
        return ExampleSettings(
            seq_len=self.seq_len,
            objective=self.objective,
            mask_probability=self.mask_probability,
            short_sequence_probability=self.short_sequence_probability,
            vocab_size=tokenizer.get_vocab_size(),
            cls_id=special.cls,
            sep_id=special.sep,
            mask_id=special.mask,
            special_ids=tuple(special),
        )


def parse(argv: Sequence[str] | None = None) -> tuple[PretrainConfig, str]:
    """Settings of the command line, and the name of the preset for naming the run."""
    path, preset, flags = parse_arguments(
        PretrainConfig,
        argv,
        description="Pre-train an encoder with masked LM and sentence structure.",
        default_preset="demo",
        presets=PRESETS,
    )
    if flags.get("resume"):
        return _resumed(Path(flags["resume"]), flags), path.stem
    values = preset | flags
    if values.get("checkpoint"):
        values |= _continued(values["checkpoint"], flags)
    return PretrainConfig(**values), path.stem


def _continued(checkpoint: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint decides: architecture, and the tokenizer unless one is given.

    Of a model on the hub they name the folder of the version at hand.
    """
    folder, model, _ = read_model(checkpoint)
    shared = {field.name for field in dataclasses.fields(PretrainConfig)} - {"vocab_size"}
    decided = {name: value for name, value in vars(model).items() if name in shared}
    if "attention_probs_dropout_prob" in flags:
        # a matter of training, not of the architecture
        del decided["attention_probs_dropout_prob"]
    _refuse_changes(flags, decided, f"--checkpoint: {checkpoint}")
    vocab = flags.get("vocab") or str(folder.resolve())
    size = load_tokenizer(vocab).get_vocab_size()
    if size > model.vocab_size:
        raise UsageError(
            f"--vocab {vocab} has {size} tokens, --checkpoint {checkpoint} {model.vocab_size}"
        )
    return decided | {"vocab": vocab, "checkpoint": str(folder.resolve())}


def _resumed(folder: Path, flags: dict[str, Any]) -> PretrainConfig:
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise UsageError(f"--resume: {folder} holds no config.yaml, expected the folder of a run")
    values = read_yaml(saved, PretrainConfig)
    fixed = {name: values.get(name) for name in flags.keys() - _FREE_ON_RESUME}
    _refuse_changes(flags, fixed, "--resume: the run")
    return PretrainConfig(**(values | flags))


def _refuse_changes(flags: dict[str, Any], held: dict[str, Any], where: str) -> None:
    for name, value in flags.items():
        if name in held and value != held[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} cannot change on {where} has {held[name]!r}, "
                f"found {value!r}"
            )
