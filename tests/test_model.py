"""The encoder and its heads: published values, invariances, losses, loading and saving."""

import json
import random
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ponet import (
    CheckpointError,
    ConfigError,
    PoNetConfig,
    PoNetForMaskedLM,
    PoNetForPreTraining,
    PoNetForSequenceClassification,
    PoNetForTokenClassification,
    PoNetModel,
)
from ponet.checkpoint import module_entries, published_name
from ponet.convert import write_published
from ponet.mixers import MIXERS, register_mixer
from ponet.packing import layout_for, layout_of, stream_of_packed, stream_of_rows
from ponet_kernels import fused_pooling, global_aggregation, use_backend
from ponet_kernels.testing import assert_close
from tests.tiny import SMALL

CLS, SEP = 101, 102


def build(cls=PoNetModel, config: PoNetConfig = SMALL, seed: int = 0, **arguments):
    torch.manual_seed(seed)
    model = cls(config, **arguments).double().eval()
    # BERT's small initial weights would hide errors behind the residual path
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1).add_(0.01 * torch.randn_like(parameter))
    return model


def pair(a: int, b: int, seed: int) -> tuple[list[int], list[int]]:
    """Ids and token types of [CLS] A [SEP] B [SEP]."""
    words = random.Random(seed).choices(range(10, 100), k=a + b)
    return [CLS, *words[:a], SEP, *words[a:], SEP], [0] * (a + 2) + [1] * (b + 1)


@pytest.mark.parametrize("mixer", ["ponet", "ponet_published"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", ["segment_ids", "no_segment_ids"])
def test_published_values_and_gradients(ponet_oracle, mixer, backend, case):
    """Hidden states, logits, losses and every gradient of the published code, within 1e-9."""
    oracle = load_file(ponet_oracle)

    def entries(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in oracle.items() if k.startswith(prefix)}

    with safe_open(ponet_oracle, "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    del sizes["mask_token_id"]
    model = PoNetForPreTraining(PoNetConfig(hidden_dropout_prob=0.0, mixer=mixer, **sizes)).double()
    model.load_weights(module_entries(entries("model.")), "oracle")
    inputs = entries("input.")
    if case == "no_segment_ids":
        del inputs["segment_ids"]
    real, labelled = inputs["attention_mask"].bool(), inputs["labels"] != -100
    with use_backend(backend):
        out = model(**inputs, output_hidden_states=True)
        out.loss.backward()
        free = model(**{k: v for k, v in inputs.items() if "labels" not in k})

    for name in ("loss", "mlm_loss", "sso_loss"):
        assert_close(getattr(out, name).view(1), oracle[f"{case}.{name}"], 1e-9, name)
    assert_close(out.sso_logits, oracle[f"{case}.sso_logits"], 1e-9, "sso_logits")
    assert_close(free.mlm_logits[real], oracle[f"{case}.mlm_logits"][real], 1e-9, "mlm_logits")
    assert_close(out.mlm_logits, oracle[f"{case}.mlm_logits"][labelled], 1e-9, "labelled logits")
    for depth, state in enumerate(out.hidden_states):
        assert_close(state[real], oracle[f"{case}.hidden.{depth}"][real], 1e-9, f"hidden {depth}")
    gradients = entries(f"{case}.grad.")
    parameters = {published_name(name): p for name, p in model.named_weights().items()}
    assert gradients.keys() == parameters.keys()
    for name, expected in gradients.items():
        assert_close(parameters[name].grad, expected, 1e-9, name)


@pytest.mark.parametrize("case", ["masked", "unmasked"])
def test_published_mixing_of_equal_chunks(lra_oracle, case):
    """The fast operators on given projections, equal chunks, with and without padding."""
    oracle = load_file(lra_oracle)
    names = ("q", "k", "o", "local", "segment")
    inputs = {n: oracle[f"input.{n}"].requires_grad_() for n in names}
    mask = oracle["input.mask"] if case == "masked" else None
    batch, length, width = inputs["q"].shape
    stream = stream_of_rows(torch.zeros(batch, length, dtype=torch.long), mask)
    special = torch.zeros(len(stream.positions), dtype=torch.bool)
    layout = layout_of(stream, special, num_segments=5)
    expected_ids = stream.pack(oracle["input.segment_index"])
    starts = layout.cu_segments[:-1].long()
    assert torch.equal(expected_ids[starts][layout.token_segments], expected_ids)

    q, k, o, local, segment = (stream.pack(inputs[name]) for name in names)
    # weights that pick q or k out of both side by side make the operator see given projections
    pick = torch.eye(2 * width, dtype=torch.float64)
    zero = torch.zeros(width, dtype=torch.float64)
    both = torch.cat([q, k], dim=1)
    g = global_aggregation(both, pick[:width], zero, pick[width:], zero, 4, layout)
    out = stream.unpack(fused_pooling(g, torch.cat([o, segment, local], dim=1), layout))
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(out[real], oracle[f"{case}.output"][real], 1e-9, "output")
    out.backward(oracle[f"{case}.grad_output"])
    for name, tensor in inputs.items():
        assert_close(tensor.grad[real], oracle[f"{case}.grad.{name}"][real], 1e-9, name)


def test_parameter_counts_of_base():
    config = PoNetConfig()
    with torch.device("meta"):
        untied = PoNetForPreTraining(config.replace(tie_word_embeddings=False))
        models = (PoNetModel(config, add_pooler=False), PoNetModel(config), untied)
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [123_065_856, 123_656_448, 147_722_301]


PAIRS = [(4, 5), (1, 0), (9, 3)]


class Batch:
    """The same sequences as rows, as a stream with offsets, and as a stream with a layout."""

    def __init__(self, config=SMALL, with_ids=False, sizes=PAIRS, padding=0, left=False, seed=0):
        self.sequences = [pair(a, b, seed + i) for i, (a, b) in enumerate(sizes)]
        lengths = torch.tensor([len(ids) for ids, _ in self.sequences])
        columns = torch.arange(int(lengths.max()) + padding)
        self.real = (columns.flip(0) if left else columns) < lengths.unsqueeze(1)
        stream, self.rows = {}, {"attention_mask": self.real.long()}
        for number, name in enumerate(("input_ids", "token_type_ids")):
            stream[name] = torch.tensor([x for each in self.sequences for x in each[number]])
            empty = torch.zeros(self.real.shape, dtype=torch.long)
            self.rows[name] = empty.masked_scatter(self.real, stream[name])
        ids = self.rows["input_ids"]
        self.labels = torch.where(self.real & (ids % 3 == 0), (ids + 7) % 120, -100)
        self.sso_labels = torch.tensor([0, 2, 1])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        self.packed = {**stream, "cu_seqlens": cu_seqlens}
        if with_ids:
            for name, row in (("segment_ids", columns // 3), ("position_ids", columns % 11)):
                self.rows[name] = row.expand(ids.shape)
                self.packed[name] = stream[name] = self.rows[name][self.real]
        tokens = stream_of_packed(stream["input_ids"], cu_seqlens)
        segment_ids = stream.pop("segment_ids", None)
        self.layout = layout_for(config, tokens, stream["input_ids"], segment_ids)
        self.given = {**stream, "layout": self.layout}


@settings(deadline=None, max_examples=10)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padding_and_neighbours_change_nothing(sizes, padding, left, seed):
    """Alone, in a batch with padding on either side, and packed: the same states."""
    model, batch = build(seed=seed), Batch(sizes=sizes, padding=padding, left=left, seed=seed)
    pairs = [map(torch.tensor, ([ids], [types])) for ids, types in batch.sequences]
    alone = [model(ids, token_type_ids=types) for ids, types in pairs]
    # padding ids are real words here: nothing may read them
    for name, word in (("input_ids", 9), ("token_type_ids", 1)):
        batch.rows[name].masked_fill_(~batch.real, word)
    batched, packed = model(**batch.rows), model(**batch.packed)
    assert not batched.last_hidden_state[~batch.real].any()
    expected = torch.cat([out.last_hidden_state[0] for out in alone])
    assert_close(batched.last_hidden_state[batch.real], expected, 1e-12, "batched")
    assert_close(packed.last_hidden_state, expected, 1e-12, "packed")
    pooled = torch.cat([out.pooler_output for out in alone])
    for out in (batched, packed):
        assert_close(out.pooler_output, pooled, 1e-12, "pooled")


def results_of(model, inputs: dict) -> dict[str, Tensor]:
    """Tensors of the output, and the gradient of every parameter."""
    model.zero_grad()
    out = model(**inputs)
    loss = out.last_hidden_state.square().sum() if isinstance(model, PoNetModel) else out.loss
    loss.backward()
    found = {name: value for name, value in vars(out).items() if isinstance(value, Tensor)}
    return found | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chosen", ["special tokens", "ids", "chunks"])
@pytest.mark.parametrize("mixer", ["ponet", "ponet_published", "attention", "longformer"])
def test_layout_in_place_of_offsets_or_rows_changes_no_bit(mixer, chosen):
    """Whatever chooses the segments, and with positions of one's own."""
    chunks = {"num_segments": 3, "separate_special_tokens": False} if chosen == "chunks" else {}
    config = SMALL.replace(mixer=mixer, **chunks)
    batch = Batch(config, with_ids=chosen == "ids")
    classes = torch.where(batch.labels < 0, batch.labels, batch.labels % 3)
    for cls, labels, others in (
        (PoNetForPreTraining, batch.labels, {"sso_labels": batch.sso_labels}),
        (PoNetForMaskedLM, batch.labels, {}),
        (PoNetForTokenClassification, classes, {}),
        (PoNetForSequenceClassification, None, {"labels": batch.sso_labels}),
        (PoNetModel, None, {}),
    ):
        model = build(cls, config.replace(num_labels=3))
        by_rows, packed, given = (x | others for x in (batch.rows, batch.packed, batch.given))
        ways = [by_rows, given]
        if labels is not None:
            by_rows["labels"] = labels
            packed["labels"] = given["labels"] = stream = labels[batch.real]
            if cls is not PoNetForTokenClassification:
                places = (stream != -100).nonzero().squeeze(1)
                positions = {"labels": stream[places], "label_positions": places}
                ways += [given | positions, packed | positions]
        expected = results_of(model, packed)
        assert len(expected) > 12
        for inputs in ways:
            found = results_of(model, inputs)
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                ours = tensor[batch.real] if tensor.ndim == 3 else tensor
                assert torch.equal(ours, expected[key]), f"{cls.__name__} {key}"
        # labels that are all ignored give a loss and gradients of zero
        ignored = {n: torch.full_like(x, -100) for n, x in by_rows.items() if "labels" in n}
        if ignored:
            found = results_of(model, by_rows | ignored)
            assert found["loss"] == 0
            assert not any(x.any() for name, x in found.items() if "logits" not in name)


def test_what_may_not_come_with_a_layout():
    batch, model = Batch(), build(PoNetForMaskedLM)
    ids = batch.given["input_ids"]
    message = rf"with layout, input_ids must be \[{len(ids)}\] and .* found input_ids \("
    others = ("attention_mask", "segment_ids", "cu_seqlens")
    wrong = [{"input_ids": ids, name: torch.ones_like(ids)} for name in others]
    for inputs in (*wrong, {"input_ids": batch.rows["input_ids"]}, {"input_ids": ids[:-1]}):
        with pytest.raises(ValueError, match=message):
            model(**inputs, layout=batch.layout)
    places = batch.given | {"label_positions": torch.tensor([0, 4])}
    with pytest.raises(ValueError, match=r"labels \(3,\) and label_positions \(2,\)"):
        model(**places, labels=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="label_positions given without labels"):
        model(**places)


@pytest.mark.parametrize(
    ("tied", "dtype", "tolerance"), [(True, torch.float64, 1e-12), (False, torch.float32, 1e-5)]
)
def test_decoder_filled_up_to_a_fast_width(monkeypatch, tied, dtype, tolerance):
    """Loss, gradients and logits are those of the vocabulary, and logits are as wide."""
    config = SMALL.replace(tie_word_embeddings=tied)
    batch, model = Batch(config), build(PoNetForPreTraining, config).to(dtype)
    inputs = {**batch.rows, "labels": batch.labels, "sso_labels": batch.sso_labels}
    expected, states = results_of(model, inputs), torch.randn(5, 24, dtype=dtype)
    head = model.mlm_head
    whole = head(states)
    assert torch.equal(head.padded(states), whole)
    monkeypatch.setattr("ponet.model.fast_width", lambda width, _: width + 8)
    found = results_of(model, inputs)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert_close(found[name].reshape(-1), tensor.reshape(-1), tolerance, name)
    assert_close(head(states), whole, tolerance)
    padded = head.padded(states)
    assert padded.shape == (5, 128)
    assert padded[:, 120:].isneginf().all()
    # an adapter's forward pass counts, so its weight is not used in its place
    head.decoder.register_forward_hook(lambda _, inputs, out: 2 * out)
    assert_close(head.padded(states), 2 * whole, tolerance)


@pytest.mark.parametrize(
    "switch", ["use_global", "use_global_second_stage", "use_segment", "use_local"]
)
def test_ablations_agree_with_the_published_form(switch):
    config, rows = SMALL.replace(**{switch: False}), Batch().rows
    configs = (config, config.replace(mixer="ponet_published"), SMALL)
    found, published, full = (build(config=c)(**rows).last_hidden_state for c in configs)
    assert_close(found, published, 1e-12)
    assert not torch.allclose(found, full)


def test_segments_of_special_tokens_and_given_ids():
    ids = torch.tensor([[CLS, 7, 7, SEP, 8, 8, SEP, 0, 0]])
    stream = stream_of_rows(ids, ids != 0)
    special = (stream.pack(ids) == CLS) | (stream.pack(ids) == SEP)
    assert layout_of(stream, special).token_segments.tolist() == [0, 1, 1, 2, 3, 3, 4]
    given = torch.tensor([0, 1, 2, 3, 4, 4, 5])
    assert layout_of(stream, special, given).token_segments.tolist() == given.tolist()
    # the published rule cuts rows of 37 into chunks of 37 // 5 + 1 = 8
    rows37 = stream_of_rows(torch.zeros(1, 37, dtype=torch.long), None)
    chunks = layout_of(rows37, torch.zeros(37, dtype=torch.bool), num_segments=5)
    assert chunks.cu_segments.tolist() == [0, 8, 16, 24, 32, 37]
    with pytest.raises(ValueError, match="sequence 0 has id 1 after 4"):
        layout_of(stream, special, torch.tensor([0, 4, 1, 3, 4, 4, 5]))


def test_masked_tokens_inside_a_row_are_absent_and_windows_do_not_cross_them():
    config = SMALL.replace(use_global=False, use_segment=False, separate_special_tokens=False)
    model = build(config=config.replace(num_hidden_layers=1))
    ids = torch.tensor([[11, 12, 13, 14, 15]])
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    out = model(ids, attention_mask=mask).last_hidden_state
    assert_close(out[:, :2], model(ids[:, :2]).last_hidden_state, 1e-12)
    right = model(ids[:, 3:], position_ids=torch.tensor([[3, 4]])).last_hidden_state
    assert_close(out[:, 3:], right, 1e-12)
    with pytest.raises(ValueError, match="ponet_published: attention_mask has padding between"):
        build(config=config.replace(mixer="ponet_published"))(ids, attention_mask=mask)


def test_edge_cases_are_finite_and_differentiable():
    """One token, special ones alone, a segment of the greatest length, padding alone, no column."""
    model = build(PoNetForPreTraining).train()
    edges = ([[CLS]], [[CLS, SEP]], [[7] * 64], [[0, 0, 0], [CLS, 9, SEP]], [[0, 0]], [[], []])
    for ids in map(torch.LongTensor, edges):
        batch = {"attention_mask": (ids != 0).long(), "labels": torch.where(ids != 0, ids, -100)}
        sso_labels = torch.zeros(len(ids), dtype=torch.long)
        out = model(ids, **batch, sso_labels=sso_labels, output_hidden_states=True)
        assert out.hidden_states[-1].shape[:2] == ids.shape
        model.zero_grad()
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_pre_layer_norm_leaves_the_last_state_normalised():
    model = build(config=SMALL.replace(norm_position="pre"))
    model.encoder.final_norm.reset_parameters()
    out = model(**Batch().packed).last_hidden_state
    assert_close(out, torch.nn.functional.layer_norm(out, (24,), eps=1e-12), 1e-9)


def test_one_label_is_a_regression():
    model = build(PoNetForSequenceClassification, SMALL.replace(num_labels=1))
    labels = torch.tensor([0.5, -1.0, 2.0])
    out = model(**Batch().rows, labels=labels)
    error = (out.logits[:, 0] - labels).square().mean()
    assert out.loss.item() == pytest.approx(error.item())


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_save_and_load_every_class(tmp_path):
    bare = SMALL.replace(type_vocab_size=0, embedding_norm=False)
    for cls, config in (
        (PoNetModel, bare),
        (PoNetForPreTraining, SMALL),
        (PoNetForMaskedLM, bare),
        (PoNetForSequenceClassification, SMALL),
        (PoNetForTokenClassification, SMALL),
    ):
        model = build(cls, config).float()
        model.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path)
        assert again.config == config
        assert_same_weights(again, model)
        # in files parameters bear the names that they have in modules
        names = dict(model.named_parameters()).keys()
        assert load_file(tmp_path / "model.safetensors").keys() == names
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("model_type", "tied", "pickled"), [("ponet", True, False), ("bert", False, True)]
)
def test_published_folder_is_written_and_read(tmp_path, model_type, tied, pickled):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    config = SMALL.replace(num_hidden_layers=12, tie_word_embeddings=tied)
    model = build(PoNetForPreTraining, config).float()
    model.save_pretrained(ours)
    (ours / "vocab.txt").write_text("[PAD]")
    write_published(ours, theirs)
    foreign = "ponet.encoder.layers.1.mixer.value.bias"
    assert published_name(foreign) == foreign
    assert (theirs / "vocab.txt").is_file()
    with pytest.raises(CheckpointError, match="expected another folder"):
        write_published(ours, ours)

    # the 257 entries of a published pre-training checkpoint, some of which say nothing new
    weights = theirs / "model.safetensors"
    entries = load_file(weights)
    word = entries["ponet.embeddings.word_embeddings.weight"]
    entries.setdefault("cls.predictions.decoder.weight", word.clone())
    entries["cls.predictions.decoder.bias"] = entries["cls.predictions.bias"].clone()
    entries["ponet.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    assert len(entries) == 257
    weights.unlink()
    write, name = (torch.save, "pytorch_model.bin") if pickled else (save_file, weights.name)
    write(entries, theirs / name)
    content = json.loads((theirs / "config.json").read_text())
    content |= {"model_type": model_type, "transformers_version": "4.7.0", "clsgsepg": True}
    del content["tie_word_embeddings"]
    (theirs / "config.json").write_text(json.dumps(content))

    again = PoNetForPreTraining.from_pretrained(theirs)
    assert (again.mlm_head.decoder.weight is again.ponet.embeddings.word.weight) is tied
    assert_same_weights(again, model)
    classifier = PoNetForSequenceClassification.from_pretrained(theirs, num_labels=5)
    assert classifier.classifier.out_features == 5
    assert torch.equal(classifier.ponet.embeddings.word.weight, word)


def test_damaged_and_foreign_checkpoints(tmp_path):
    PoNetForPreTraining(SMALL).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    pickled, exploit = tmp_path / "pytorch_model.bin", tmp_path / "exploit"
    fields = json.loads(config.read_text())
    torch.save({"x": Exploit()}, exploit)

    def refused(error: type[Exception], message: str, **changes) -> None:
        config.write_text(json.dumps(fields | changes))
        with pytest.raises(error, match=message):
            PoNetForPreTraining.from_pretrained(tmp_path)

    shapes = r"embeddings.word.weight: expected \(120, 48\), found \(120, 24\)"
    refused(CheckpointError, shapes, hidden_size=48)
    refused(CheckpointError, r"encoder\.layers\.2.*: missing", num_hidden_layers=3)
    refused(
        ConfigError, "model_type is 'roberta', expected ponet or bert or fnet", model_type="roberta"
    )
    weights.write_bytes(weights.read_bytes()[:999])
    refused(CheckpointError, r"model\.safetensors: damaged")
    weights.unlink()
    refused(CheckpointError, "found neither")
    torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "nested")
    nested = (tmp_path / "nested").read_bytes()
    for content in (b"not a checkpoint", exploit.read_bytes(), nested):
        pickled.write_bytes(content)
        refused(CheckpointError, r"pytorch_model\.bin: damaged or not a checkpoint")
    for damage, message in (("{", "not a JSON document"), ("[]", "found list")):
        config.write_text(damage)
        with pytest.raises(ConfigError, match=message):
            PoNetModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="nothing: no such folder, expected a model folder"):
        PoNetModel.from_pretrained(tmp_path / "nothing")


class Exploit:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    model = PoNetForPreTraining(SMALL)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with torch.no_grad():
        model.sso_head.bias.add_(1)
    with pytest.raises(OSError, match=r"MiB free\): No space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10}, "hidden_size 10 is not a multiple of num_attention_heads 12"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, found 0"),
        ({"type_vocab_size": -1}, "type_vocab_size must be at least 0, found -1"),
        ({"norm_position": "sandwich"}, "norm_position must be post or pre, found 'sandwich'"),
        ({"use_global": False, "use_segment": False, "use_local": False}, "nothing mixes"),
        ({"num_segments": 0}, "num_segments must be at least 1"),
        ({"segment_pooling": "mean"}, "segment_pooling must be max or average, found 'mean'"),
        ({"local_pooling": "min"}, "local_pooling must be max or average, found 'min'"),
        ({"local_window": 4}, "local_window must be odd and at least 1, found 4"),
    ],
)
def test_contradictory_configurations(fields, message):
    with pytest.raises(ConfigError, match=message):
        PoNetConfig(**fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[5, 120]]}, "input_ids hold 5 to 120, vocab_size is 120"),
        ({"input_ids": [[7] * 65]}, "position_ids hold 0 to 64, max_position_embeddings is 64"),
        ({"token_type_ids": [[0, 2]]}, "token_type_ids hold 0 to 2, type_vocab_size is 2"),
        ({"position_ids": [[-1, 3]]}, "position_ids hold -1 to 3, max_position_embeddings"),
        ({"attention_mask": [[1] * 3]}, r"mask has shape \(1, 3\), input_ids \(1, 2\)"),
        ({"cu_seqlens": [0, 3]}, r"must be \[T\] .* found input_ids \(1, 2\)"),
        ({"input_ids": [5, 7], "cu_seqlens": [0, 3]}, "must ascend from 0 to 2"),
        ({"input_ids": [5, 7]}, r"must be \[B, N\] rows, found \(2,\)"),
        ({"types": 0, "token_type_ids": [[0, 1]]}, "given to a model with type_vocab_size 0"),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    config = SMALL.replace(type_vocab_size=inputs.get("types", 2))
    inputs = {"input_ids": [[5, 7]]} | inputs
    tensors = {name: torch.tensor(x) for name, x in inputs.items() if name != "types"}
    with pytest.raises(ValueError, match=message):
        build(config=config)(**tensors)


def test_mixer_from_outside_and_former_name(tmp_path, monkeypatch):
    config, own = SMALL.replace(mixer="own"), MIXERS["fnet"]
    # after the test it is forgotten
    monkeypatch.setitem(MIXERS, "own", own)
    del MIXERS["own"]
    with pytest.raises(ConfigError, match="mixer must be one of"):
        PoNetModel(config)
    for _ in range(2):
        register_mixer("own", own)
    build(config=config).save_pretrained(tmp_path)
    assert isinstance(PoNetModel.from_pretrained(tmp_path).encoder.layers[0].mixer, own)
    for name in ("ponet", "ponet_eager"):
        with pytest.raises(ValueError, match=f"'{name}' is the name of another mixer"):
            register_mixer(name, own)
    # the former name of the published form stands in configurations that were stored before
    mixer = build(config=SMALL.replace(mixer="ponet_eager")).encoder.layers[0].mixer
    assert isinstance(mixer, MIXERS["ponet_published"])
