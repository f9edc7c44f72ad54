"""Nystromformer, Reformer, Longformer and BigBird against published code and plain formulas."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig, NystromformerConfig, ReformerConfig
from transformers.models.big_bird import modeling_big_bird
from transformers.models.longformer import modeling_longformer
from transformers.models.nystromformer import modeling_nystromformer
from transformers.models.reformer import modeling_reformer

from ponet import ConfigError
from ponet.mixers.bigbird import BigBirdAttention
from ponet.mixers.longformer import SlidingWindowAttention
from ponet.mixers.nystromformer import NystromAttention
from ponet.mixers.reformer import LSHAttention
from tests.mixing import CONFIG, build, compare, states
from tests.streams import packed, padded

SIZES = {"hidden_size": 12, "num_attention_heads": 3, "attention_probs_dropout_prob": 0.0}


def heads(values: Tensor) -> Tensor:
    return values.unflatten(-1, (3, -1)).transpose(-3, -2)


def attention(mixer, hidden: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention `[N, C]` over the pairs `[N, N]` or `[H, N, N]` that are allowed."""
    query, key, value = (heads(p(hidden)) for p in (mixer.query, mixer.key, mixer.value))
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(0, 1).flatten(1)


def compare_published(published: nn.Module, mixer, length: int, *others) -> None:
    """Two sequences by the published module, with the mixer's parameters, so gradients agree."""
    for name in ("query", "key", "value", "query_key", "conv"):
        if hasattr(mixer, name):
            setattr(published, name, getattr(mixer, name))
    hidden = states(2 * length)
    context = published.double()(hidden.unflatten(0, (2, length)), *others)[0]
    expected = mixer.dense(context.flatten(0, 1))
    compare(mixer, packed([length] * 2), hidden, expected, 1e-11)


def test_published_nystromformer():
    sizes = {"num_landmarks": 4, "segment_means_seq_len": 32, "conv_kernel_size": 5}
    config = NystromformerConfig(**SIZES, **sizes)
    published = modeling_nystromformer.NystromformerSelfAttention(config)
    # the norm of each matrix; the option for it reads a key that does not exist
    published.init_option = "exact"
    compare_published(published, build(NystromAttention), 32)


@pytest.mark.parametrize("num_hashes", [1, 3])
@pytest.mark.parametrize(("length", "num_buckets"), [(8, 4), (16, 8), (48, 8)])
def test_published_reformer(num_hashes, length, num_buckets):
    """Of 48 tokens the published code would make 16 buckets from two hashes, if not told to."""
    config = ReformerConfig(
        **SIZES,
        attention_head_size=4,
        num_hashes=num_hashes,
        num_buckets=num_buckets,
        lsh_attn_chunk_length=4,
        hash_seed=7,
    )
    mixer = build(LSHAttention, CONFIG.replace(num_hashes=num_hashes))
    torch.manual_seed(7)
    rotations = torch.randn(3, 4, num_hashes, num_buckets // 2, dtype=torch.float64)
    mixer.rotations[..., : num_buckets // 2] = rotations
    compare_published(modeling_reformer.LSHSelfAttention(config), mixer, length)


def test_published_longformer(monkeypatch):
    config = LongformerConfig(**SIZES, attention_window=[8])
    published = modeling_longformer.LongformerSelfAttention(config, layer_id=0)
    # it computes the softmax in float32
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    nowhere = torch.zeros(2, 24)
    others = (nowhere, nowhere.bool(), nowhere.bool(), False)
    compare_published(published, build(SlidingWindowAttention), 24, *others)


def test_published_bigbird(monkeypatch):
    length, num_blocks = 36, 9
    config = BigBirdConfig(**SIZES, block_size=4, num_random_blocks=2, use_bias=True)
    published = modeling_big_bird.BigBirdBlockSparseAttention(config)
    mixer = build(BigBirdAttention)
    blocks, drawn = mixer.random_blocks(torch.tensor([num_blocks]), num_blocks)
    assert drawn.all()
    chosen = blocks[0, 1:-1].transpose(0, 1).numpy()
    monkeypatch.setattr(published, "_bigbird_block_rand_mask_with_head", lambda **_: list(chosen))
    masks_of = modeling_big_bird.BigBirdModel.create_masks_for_block_sparse_attn
    blocked, band, rows, columns = masks_of(torch.ones(2, length, dtype=torch.float64), 4)
    compare_published(published, mixer, length, band, rows, columns, blocked, blocked)


LENGTHS = [[1], [3], [4], [17], [63], [64], [9, 0, 1, 30, 12, 4]]


def nystrom_of_one(mixer: NystromAttention, hidden: Tensor) -> Tensor:
    query, key, value = (heads(p(hidden)) for p in (mixer.query, mixer.key, mixer.value))
    assert mixer.conv is not None
    skip = mixer.conv(value.unsqueeze(0))[0].transpose(0, 1).flatten(1)
    length, m = len(hidden), mixer.num_landmarks
    if length <= m:
        return attention(mixer, hidden, torch.ones(length, length, dtype=torch.bool)) + skip
    chunks = [[t for t in range(length) if t * m // length == chunk] for chunk in range(m)]
    queries, keys = (torch.stack([x[:, c].mean(1) for c in chunks], 1) for x in (query, key))

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.mT / left.shape[-1] ** 0.5).softmax(dim=-1)

    matrix = kernel(queries, keys)
    ones = torch.eye(m, dtype=torch.float64)
    inverse = torch.stack([a.mT / a.sum(0).max() / a.sum(1).max() for a in matrix])
    for _ in range(6):
        az = matrix @ inverse
        inverse = inverse @ (13 * ones - az @ (15 * ones - az @ (7 * ones - az))) / 4
    mixed = kernel(query, keys) @ inverse @ kernel(queries, key) @ value
    return mixed.transpose(0, 1).flatten(1) + skip


def reformer_of_one(mixer: LSHAttention, hidden: Tensor) -> Tensor:
    """One softmax over the union of the keys of all rounds, counted as often as they are seen."""
    length, size = len(hidden), mixer.chunk_size
    vectors, values = heads(mixer.query_key(hidden)), heads(mixer.value(hidden))
    keys = vectors / (vectors.square().sum(-1, keepdim=True) + 4e-6).sqrt()
    half = 1
    while 2 * half <= min(length // size, mixer.rotations.shape[3]):
        half *= 2
    outputs = []
    for head in range(3):
        sorted_chunks = []
        for rotation in mixer.rotations[head].unbind(1):
            rotated = vectors[head] @ rotation[:, :half]
            buckets = torch.cat([rotated, -rotated], dim=1).argmax(1).tolist()
            order = sorted(range(length), key=lambda t: (buckets[t], t))
            sorted_chunks.append([order[i : i + size] for i in range(0, length, size)])
        seen = torch.zeros(length, length, dtype=torch.float64)
        for r, chunks in enumerate(sorted_chunks):
            for before, chunk in zip([sorted_chunks[r - 1][-1], *chunks], chunks, strict=False):
                for query, key in itertools.product(chunk, chunk + before):
                    seen[query, key] += 1
        scores = (vectors[head] @ keys[head].T).masked_fill(seen == 0, -torch.inf) + seen.log()
        itself = torch.eye(length, dtype=torch.bool)
        scores = torch.where(itself, -1e5 + seen.log(), scores)
        outputs.append(scores.softmax(-1) @ values[head])
    return torch.cat(outputs, dim=1)


def longformer_of_one(mixer: SlidingWindowAttention, hidden: Tensor) -> Tensor:
    places = torch.arange(len(hidden))
    return attention(mixer, hidden, (places.unsqueeze(1) - places).abs() <= mixer.reach)


def bigbird_of_one(mixer: BigBirdAttention, hidden: Tensor) -> Tensor:
    count = -(-len(hidden) // mixer.block_size)
    chosen, drawn = mixer.random_blocks(torch.tensor([count]), count)
    pairs = torch.zeros(3, count, count, dtype=torch.bool)
    for head, row in itertools.product(range(3), range(count)):
        seen = {0, row - 1, row, row + 1, count - 1} & set(range(count))
        randoms = chosen[0, row, head][drawn[0, row]].tolist()
        # as many as there are, all different, none that is seen anyway
        assert len(set(randoms) - seen) == len(randoms) == min(2, count - len(seen))
        assert set(randoms) <= set(range(count))
        pairs[head, row, list(seen) + randoms] = True
    pairs[:, [0, -1]] = True
    size = mixer.block_size
    tokens = pairs.repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)
    return attention(mixer, hidden, tokens[:, : len(hidden), : len(hidden)])


FORMULAS = {
    NystromAttention: nystrom_of_one,
    LSHAttention: reformer_of_one,
    SlidingWindowAttention: longformer_of_one,
    BigBirdAttention: bigbird_of_one,
}
every_mixer = pytest.mark.parametrize("cls", FORMULAS, ids=lambda cls: cls.__name__)


@every_mixer
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths)))
def test_formula_at_any_length(cls, lengths):
    """Dense formulas in float64, one sequence at a time."""
    mixer, hidden = build(cls), states(sum(lengths))
    parts = [FORMULAS[cls](mixer, part) for part in hidden.split(lengths) if len(part)]
    compare(mixer, packed(lengths), hidden, mixer.dense(torch.cat(parts)), 1e-11)


@every_mixer
@pytest.mark.parametrize("ragged", [False, True])
def test_memory_is_linear(cls, ragged):
    """Twice the tokens, twice the largest tensor that is kept, and nothing as large as N * N."""
    length = 4096
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": length}
    chunks = {"num_landmarks": 16, "lsh_chunk_size": 16, "attention_window": 32, "block_size": 16}
    mixer, largest = cls(CONFIG.replace(**sizes, **chunks)), []
    for n in (length // 2, length):
        kept: list[int] = []
        layout = padded([n, n // 2], n) if ragged else packed([n])
        hidden = torch.randn(len(layout.token_segments), 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.untyped_storage().nbytes()) or x, lambda x: x
        ):
            mixer(hidden, layout)
        largest.append(max(kept) / 4)
    assert largest[1] < length * length / 4
    assert largest[1] < 2.2 * largest[0]


@pytest.mark.parametrize("cls", [LSHAttention, BigBirdAttention], ids=lambda cls: cls.__name__)
def test_random_choices_follow_from_the_configuration(cls):
    """Checkpoints hold parameters only, so anything random must not depend on the moment."""
    torch.manual_seed(0)
    first, second = cls(CONFIG), cls(CONFIG)
    second.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {name for name, _ in first.named_parameters()}
    hidden = states(40).float()
    assert torch.equal(first(hidden, packed([40])), second(hidden, packed([40])))


def test_random_blocks_are_spread():
    """Each head and row draws anew, and every free block of a row is about as likely."""
    mixer = BigBirdAttention(CONFIG.replace(hidden_size=2000, num_attention_heads=2000))
    blocks, drawn = mixer.random_blocks(torch.tensor([10]), 10)
    assert drawn.all()
    counts = blocks[0, 5].flatten().bincount(minlength=10)
    assert not counts[[0, 4, 5, 6, 9]].any()
    shares = counts[[1, 2, 3, 7, 8]] / counts.sum()
    assert float((shares - 0.2).abs().max()) < 0.03


def test_contradictory_configurations():
    with pytest.raises(ConfigError, match="landmark_conv_size must be odd, found 4"):
        NystromAttention(CONFIG.replace(landmark_conv_size=4))
    with pytest.raises(ConfigError, match="at least 2, found 1"):
        SlidingWindowAttention(CONFIG.replace(attention_window=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_reformer_hashes_in_float32(dtype, autocast):
    """No token leaves its bucket of float64; of half-precision hashes 3 to 25 % of them do."""
    mixer, layout = build(LSHAttention).float(), packed([64] * 20)
    hidden = states(1280).detach().float()
    if not autocast:
        mixer, hidden = mixer.to(dtype), hidden.to(dtype)
    expected = mixer.double()(hidden.double(), layout)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = mixer.to(hidden.dtype)(hidden, layout)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
