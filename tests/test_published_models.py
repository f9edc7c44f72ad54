"""Published models: BERT and FNet of transformers both ways, PoNet from every form of file."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from glue.model import build_classifier, read_checkpoint
from glue.settings import parse as parse_glue
from glue.tasks import TASKS
from ponet import (
    CheckpointError,
    ConfigError,
    PoNetConfig,
    PoNetForMaskedLM,
    PoNetForPreTraining,
    PoNetForSequenceClassification,
    PoNetForTokenClassification,
    PoNetModel,
    PoolerConfig,
)
from ponet.convert import main, write_published
from ponet.run.cli import UsageError
from ponet.tokenizer import SPECIAL_TOKENS, load_tokenizer
from ponet_kernels.testing import assert_close
from pretrain.run import build_model
from pretrain.settings import parse as parse_pretrain
from tests.tiny import SMALL, WORDS

transformers = pytest.importorskip("transformers")

# width, heads, feed-forward width, layers
SIZES = {"tiny": (8, 1, 12, 1), "odd": (33, 3, 50, 2), "twelve": (48, 12, 80, 2)}
CLASSES = {
    "Model": PoNetModel,
    "ForMaskedLM": PoNetForMaskedLM,
    "ForPreTraining": PoNetForPreTraining,
    "ForNextSentencePrediction": PoNetForPreTraining,
    "ForSequenceClassification": PoNetForSequenceClassification,
    "ForTokenClassification": PoNetForTokenClassification,
}
VOCABULARY, POSITIONS, LENGTH = 90, 40, 21
# their heads -> ours
OUTPUTS = {
    "last_hidden_state": "last_hidden_state",
    "pooler_output": "pooler_output",
    "prediction_logits": "mlm_logits",
    "seq_relationship_logits": "sso_logits",
    "logits": "logits",
}


def published(kind: str, head: str, size: str = "odd", **fields):
    """A model of transformers with random weights that are not small."""
    width, heads, inner, layers = SIZES[size]
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        max_position_embeddings=POSITIONS,
        num_labels=5,
        **({"num_attention_heads": heads} if kind == "Bert" else {}),
        **fields,
    )
    model = getattr(transformers, kind + head)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(kind: str) -> dict[str, Tensor]:
    """Token types, and for BERT ragged rows; the published FNet mixes padding, so it gets none."""
    torch.manual_seed(4)
    ids = torch.randint(5, VOCABULARY, (3, LENGTH))
    lengths = torch.tensor([LENGTH, 9, 2] if kind == "Bert" else [LENGTH] * 3)
    mask = torch.arange(LENGTH) < lengths.unsqueeze(1)
    types = (torch.arange(LENGTH) > 6).long().expand(ids.shape)
    return {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": types}


@torch.no_grad()
def assert_same_outputs(theirs, ours, kind: str, head: str, tolerance: float) -> None:
    inputs = batch(kind)
    real = inputs["attention_mask"].bool()
    with_mask = kind == "Bert"
    out = theirs(**{n: x for n, x in inputs.items() if with_mask or n != "attention_mask"})
    found, compared = ours(**inputs), 0
    for name, own in OUTPUTS.items():
        if head == "ForNextSentencePrediction" and name == "logits":
            own = "sso_logits"
        expected = getattr(out, name, None)
        if expected is None or (own == "pooler_output" and found.pooler_output is None):
            continue
        rows = slice(None) if expected.ndim == 2 else real
        assert_close(getattr(found, own)[rows], expected[rows], tolerance, name)
        compared += 1
    assert compared == (2 if head in ("Model", "ForPreTraining") else 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", CLASSES)
@pytest.mark.parametrize("kind", ["Bert", "FNet"])
def test_models_of_transformers_both_ways(tmp_path, kind, head, size):
    """Outputs in float64 within 1e-9 and in float32 within 5e-6; tensors come back exactly."""
    theirs, cls = published(kind, head, size), CLASSES[head]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = cls.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert_same_outputs(theirs, ours, kind, head, 1e-9)
    single = cls.from_pretrained(tmp_path / "theirs")
    assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}
    assert_same_outputs(theirs.float(), single, kind, head, 5e-6)

    entries = load_file(tmp_path / "theirs" / "model.safetensors")
    ours.save_pretrained(tmp_path / "ours")
    for source in ("theirs", "ours"):
        target = tmp_path / f"{source}-back"
        write_published(tmp_path / source, target)
        again, report = type(theirs).from_pretrained(target, output_loading_info=True)
        assert not report["mismatched_keys"]
        # the pooler of an FNet that does not use it is not part of our model
        assert all(".pooler." in name for name in report["missing_keys"])
        for name, tensor in load_file(target / "model.safetensors").items():
            name = name if name in entries else name.split(".", 1)[1]
            if head != "ForNextSentencePrediction" or name in entries:
                assert torch.equal(tensor, entries[name]), name
        assert_same_outputs(again.double(), ours, kind, head, 1e-9)


def test_untied_decoder_both_ways(tmp_path):
    """With a bias of its own, which the published head adds in place of the other."""
    for kind in ("Bert", "FNet"):
        theirs = published(kind, "ForMaskedLM", tie_word_embeddings=False)
        head = theirs.cls.predictions
        assert not torch.equal(head.bias, head.decoder.bias)
        theirs.save_pretrained(tmp_path / kind)
        ours = PoNetForMaskedLM.from_pretrained(tmp_path / kind, dtype="auto")
        assert not ours.config.tie_word_embeddings
        assert_same_outputs(theirs, ours, kind, "ForMaskedLM", 1e-9)
        ours.save_pretrained(tmp_path / "ours")
        write_published(tmp_path / "ours", tmp_path / "back")
        again = type(theirs).from_pretrained(tmp_path / "back")
        assert_same_outputs(again, ours, kind, "ForMaskedLM", 1e-9)


def test_old_names_and_shards_of_bert(tmp_path):
    """LayerNorm's gamma and beta, and parts in either format; a missing part is named."""
    theirs = published("Bert", "ForPreTraining")
    theirs.save_pretrained(tmp_path / "new")
    entries = load_file(tmp_path / "new" / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    named = {}
    for name, tensor in entries.items():
        end = ".".join(name.split(".")[-2:])
        named[name.removesuffix(end) + old.get(end, end)] = tensor
    assert sum("gamma" in name for name in named) == 6
    write_folder(tmp_path / "old", named, tmp_path / "new")
    ours = PoNetForPreTraining.from_pretrained(tmp_path / "old", dtype="auto")
    assert_same_outputs(theirs, ours, "Bert", "ForPreTraining", 1e-9)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 2
    ours = PoNetForPreTraining.from_pretrained(tmp_path / "parts", dtype="auto")
    assert_same_outputs(theirs, ours, "Bert", "ForPreTraining", 1e-9)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[1].name}: no such file"):
        PoNetForPreTraining.from_pretrained(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json: damaged or no index"):
        PoNetForPreTraining.from_pretrained(tmp_path / "parts")


def write_folder(folder: Path, entries: dict[str, Tensor], like: Path, form: str = "safetensors"):
    """A model folder in one file or in two parts, of either format."""
    folder.mkdir()
    shutil.copy(like / "config.json", folder)
    ending = "bin" if form.endswith("bin") else "safetensors"
    stem, write = ("pytorch_model", torch.save) if ending == "bin" else ("model", save_file)
    if not form.startswith("parts"):
        write(entries, folder / f"{stem}.{ending}")
        return
    names, index = sorted(entries), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{ending}"
        write({name: entries[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{stem}.{ending}.index.json").write_text(text)


class Golden:
    """The published PoNet in float64: its entries, configuration, inputs and outputs."""

    def __init__(self, oracle: Path, folder: Path) -> None:
        tensors = load_file(oracle)
        with safe_open(oracle, "pt") as file:
            sizes = json.loads(file.metadata()["config"])
        self.entries = _under("model.", tensors)
        self.out = _under("segment_ids.", tensors)
        self.inputs = {n: x for n, x in _under("input.", tensors).items() if "labels" not in n}
        self.real = self.inputs["attention_mask"].bool()
        self.folder = folder / "golden"
        self.folder.mkdir()
        # as of the first release, which calls itself BERT
        self.content = {"hidden_act": "gelu", "hidden_dropout_prob": 0.1, **sizes}
        self.content |= {"model_type": "bert", "clsgsepg": True}
        self.configure()

    def configure(self, **changes) -> None:
        content = {n: x for n, x in (self.content | changes).items() if x is not None}
        (self.folder / "config.json").write_text(json.dumps(content))

    def assert_outputs(self, model, tolerance: float = 1e-9) -> None:
        out = model(**self.inputs, output_hidden_states=True)
        last = self.out["hidden.2"][self.real]
        assert_close(out.hidden_states[-1][self.real], last, tolerance, "last state")
        if isinstance(model, PoNetForPreTraining):
            assert_close(out.sso_logits, self.out["sso_logits"], tolerance, "sso_logits")
        if not isinstance(model, PoNetModel):
            logits = getattr(out, "mlm_logits", getattr(out, "logits", None))
            expected = self.out["mlm_logits"][self.real]
            assert_close(logits[self.real], expected, tolerance, "mlm_logits")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


@pytest.fixture
def golden(ponet_oracle, tmp_path) -> Golden:
    return Golden(ponet_oracle, tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin", "parts-safetensors", "parts-bin"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_golden_ponet_from_every_file_form(tmp_path, golden, form, dtype):
    """Every tensor as the file has it; outputs where the file is precise."""
    stored = {name: tensor.to(dtype) for name, tensor in golden.entries.items()}
    write_folder(tmp_path / "form", stored, golden.folder, form)
    model = PoNetForPreTraining.from_pretrained(tmp_path / "form", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "ours")
    write_published(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    # of two names of one tensor the file that is written has one
    doubled = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert stored.keys() - back.keys() <= doubled | {"ponet.embeddings.position_ids"}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in back.items())
    wide = PoNetForPreTraining.from_pretrained(tmp_path / "form", dtype=torch.float64)
    for name, parameter in wide.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).double()), name
    if dtype.itemsize > 2:
        golden.assert_outputs(wide, 1e-9 if dtype == torch.float64 else 1e-5)


def test_golden_ponet_with_and_without_prefix_heads_and_a_decoder_of_its_own(tmp_path, golden):
    whole = golden.entries
    encoder = {n: x for n, x in whole.items() if n.startswith("ponet.")}
    bare = {n.removeprefix("ponet."): x for n, x in encoder.items()}
    # ModelScope's masked LM has no pooler and no sentence head
    mlm = {n: x for n, x in whole.items() if "pooler" not in n and "seq_relationship" not in n}
    words = whole["ponet.embeddings.word_embeddings.weight"]
    untied = whole | {"cls.predictions.decoder.weight": words + 1}
    tied = whole | {"cls.predictions.decoder.weight": words.clone()}
    for name, entries, cls in (
        ("encoder", encoder, PoNetModel),
        ("bare", bare, PoNetModel),
        ("mlm", mlm, PoNetForMaskedLM),
        ("tied", tied, PoNetForPreTraining),
    ):
        write_folder(tmp_path / name, entries, golden.folder)
        for mixer in ("ponet", "ponet_published"):
            model = cls.from_pretrained(tmp_path / name, dtype=torch.float64, mixer=mixer)
            golden.assert_outputs(model)
    write_folder(tmp_path / "untied", untied, golden.folder)
    head = PoNetForMaskedLM.from_pretrained(tmp_path / "untied", dtype="auto").mlm_head
    assert torch.equal(head.decoder.weight, words + 1)
    # nothing but the names of the weights tells that this is no BERT
    golden.configure(clsgsepg=None)
    write_folder(tmp_path / "silent", whole, golden.folder)
    model = PoNetForPreTraining.from_pretrained(tmp_path / "silent", dtype="auto")
    golden.assert_outputs(model)


def warnings_of(caplog) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_missing_heads_start_fresh_with_one_warning(tmp_path, caplog):
    theirs = published("Bert", "ForMaskedLM")
    theirs.save_pretrained(tmp_path / "mlm")
    published("Bert", "Model").save_pretrained(tmp_path / "bare")
    entries = load_file(tmp_path / "mlm" / "model.safetensors")
    del entries["cls.predictions.transform.dense.bias"]
    write_folder(tmp_path / "half", entries, tmp_path / "mlm")
    del entries["bert.encoder.layer.1.output.dense.bias"]
    write_folder(tmp_path / "hole", entries, tmp_path / "mlm")
    caplog.clear()
    own = PoolerConfig(name="mha", num_heads=3)
    for folder, cls, changes, heads in (
        ("mlm", PoNetForMaskedLM, {}, None),
        ("mlm", PoNetModel, {"add_pooler": False}, None),
        ("mlm", PoNetModel, {}, "ponet.pooler"),
        ("mlm", PoNetForPreTraining, {}, "sso_head, ponet.pooler"),
        ("mlm", PoNetForSequenceClassification, {"num_labels": 7}, "classifier, ponet.pooler"),
        ("mlm", PoNetForSequenceClassification, {"pooler": own}, "classifier, pooler"),
        ("bare", PoNetForPreTraining, {}, "mlm_head, sso_head"),
        ("bare", PoNetForTokenClassification, {}, "classifier"),
    ):
        cls.from_pretrained(tmp_path / folder, **changes)
        expected = [f"{tmp_path / folder}: initialised at random: {heads}"] if heads else []
        assert warnings_of(caplog) == expected
    # what is there in part is damaged
    with pytest.raises(CheckpointError, match=r"1 weights .* mlm_head\.dense\.bias: missing"):
        PoNetForMaskedLM.from_pretrained(tmp_path / "half")
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.down\.bias: missing"):
        PoNetForTokenClassification.from_pretrained(tmp_path / "hole")
    with pytest.raises(TypeError, match=r"PoNetForMaskedLM\.__init__\(\) got .* 'num_label'"):
        PoNetForMaskedLM.from_pretrained(tmp_path / "mlm", num_label=2)


def test_another_number_of_labels_on_request(tmp_path, caplog):
    theirs = published("Bert", "ForSequenceClassification")
    theirs.save_pretrained(tmp_path)
    load = PoNetForSequenceClassification.from_pretrained
    assert load(tmp_path).config.num_labels == 5
    shapes = r"classifier\.weight: expected \(3, 33\), found \(5, 33\)"
    with pytest.raises(CheckpointError, match=f"{shapes}.*ignore_mismatched_sizes=True lets"):
        load(tmp_path, num_labels=3)
    assert not warnings_of(caplog)
    model = load(tmp_path, num_labels=3, ignore_mismatched_sizes=True, dtype=torch.float64)
    assert warnings_of(caplog) == [f"{tmp_path}: initialised at random: classifier"]
    assert model.classifier.weight.shape == (3, 33)
    assert torch.equal(model.ponet.pooler.weight, theirs.bert.pooler.dense.weight)
    # of the encoder nothing may be of another size
    with pytest.raises(CheckpointError, match=r"word\.weight: expected") as caught:
        load(tmp_path, vocab_size=91, ignore_mismatched_sizes=True)
    assert "ignore_mismatched" not in str(caught.value)


def test_positions_repeat_to_any_length(tmp_path):
    theirs = published("Bert", "Model")
    theirs.save_pretrained(tmp_path)
    table = theirs.embeddings.position_embeddings.weight
    for length in (2 * POSITIONS + 7, POSITIONS - 9):
        model = PoNetModel.from_pretrained(tmp_path, max_position_embeddings=length, dtype="auto")
        expected = table[torch.arange(length) % POSITIONS]
        assert torch.equal(model.embeddings.position.weight, expected)
        assert model(torch.full((1, length), 7)).last_hidden_state.shape == (1, length, 33)
    # a folder that contradicts itself is no wish
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 50}))
    with pytest.raises(CheckpointError, match=r"position\.weight: expected \(50, 33\)"):
        PoNetModel.from_pretrained(tmp_path)


def test_half_precision_is_kept(tmp_path):
    model = PoNetForPreTraining(SMALL).bfloat16()
    model.save_pretrained(tmp_path)
    for dtype, expected in (
        ("auto", torch.bfloat16),
        (None, torch.float32),
        (torch.float16, torch.float16),
    ):
        again = PoNetForPreTraining.from_pretrained(tmp_path, dtype=dtype)
        for name, parameter in again.named_parameters():
            assert parameter.dtype == expected
            assert torch.equal(parameter, model.get_parameter(name).to(expected))
        assert again.mlm_head.decoder.weight is again.ponet.embeddings.word.weight


def test_fnet_without_projection_gets_one_that_changes_nothing(tmp_path):
    config = SMALL.replace(mixer="fnet", num_sentence_labels=2)
    ours = PoNetForPreTraining(config).double().eval()
    ours.save_pretrained(tmp_path / "ours")
    write_published(tmp_path / "ours", tmp_path / "theirs")
    theirs = transformers.FNetForPreTraining.from_pretrained(tmp_path / "theirs").double()
    assert theirs.config.hidden_act == "gelu"
    assert_same_outputs(theirs, ours, "FNet", "ForPreTraining", 1e-9)


def test_three_sentence_labels_become_a_masked_lm(tmp_path):
    """The published BERT predicts two classes; the third part of the head stays in the file."""
    ours = PoNetForPreTraining(SMALL.replace(mixer="attention")).double().eval()
    ours.save_pretrained(tmp_path / "ours")
    write_published(tmp_path / "ours", tmp_path / "theirs")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs")
    assert type(theirs).__name__ == "BertForMaskedLM"
    mlm = PoNetForMaskedLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert_same_outputs(theirs, mlm, "Bert", "ForMaskedLM", 1e-9)
    again = PoNetForPreTraining.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert torch.equal(again.sso_head.weight, ours.sso_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "linear"}, "mixer linear has no published form, expected one of ponet, "),
        ({"norm_position": "pre"}, "bert has norm_position post, found pre"),
        ({"embedding_norm": False}, "bert has embedding_norm True, found False"),
        ({"embedding_projection": True}, "bert has embedding_projection False, found True"),
        ({"type_vocab_size": 0}, "bert has token types, found type_vocab_size 0"),
        ({"pooler": PoolerConfig(name="mean")}, "BertForSequenceClassification has the pooler cls"),
    ],
)
def test_what_has_no_published_form(tmp_path, monkeypatch, changes, message):
    config = SMALL.replace(**{"mixer": "attention"} | changes)
    PoNetForSequenceClassification(config).save_pretrained(tmp_path / "ours")
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "ours"), str(tmp_path / "new")])
    with pytest.raises(SystemExit, match=message):
        main()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be gelu or gelu_new, found 'relu'"),
        ({"is_decoder": True}, "is_decoder is True, expected False"),
        ({"position_embedding_type": "relative_key"}, "expected absolute"),
    ],
)
def test_architectures_that_are_refused(tmp_path, changes, message):
    config = transformers.BertConfig().to_dict() | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        PoNetConfig.from_file(path)


@pytest.mark.parametrize("kind", ["Bert", "FNet"])
def test_what_a_configuration_leaves_unsaid(tmp_path, kind):
    """Is as in transformers, field by field."""
    theirs = getattr(transformers, f"{kind}Config")()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": theirs.model_type}))
    ours = PoNetConfig.from_file(path)
    shared = {name for name in vars(ours) if hasattr(theirs, name)} - {"cls_token_id"}
    assert len(shared) > 12
    for name in shared - {"sep_token_id"}:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_names_of_the_tanh_gelu(tmp_path):
    path = tmp_path / "config.json"
    for name in ("gelu_new", "gelu_pytorch_tanh"):
        path.write_text(json.dumps(transformers.FNetConfig(hidden_act=name).to_dict()))
        config = PoNetConfig.from_file(path)
        assert (config.hidden_act, config.pad_token_id) == ("gelu_new", 3)


def test_tied_parameters_that_share_memory_in_a_pickle(tmp_path):
    """As transformers wrote for years; the file that is written holds them once."""
    theirs = published("Bert", "ForPreTraining")
    theirs.save_pretrained(tmp_path / "theirs")
    write_folder(tmp_path / "old", theirs.state_dict(), tmp_path / "theirs", "bin")
    assert "cls.predictions.decoder.weight" in theirs.state_dict()
    write_published(tmp_path / "old", tmp_path / "back")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_hub_names_come_from_the_cache_by_revision(tmp_path, monkeypatch):
    """The cache of huggingface_hub as a download leaves it; nothing reaches for the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--bert"
    for branch, seed in (("main", "a"), ("other", "b")):
        snapshot = repository / "snapshots" / (seed * 40)
        model = published("Bert", "Model", "tiny" if seed == "a" else "odd")
        model.save_pretrained(snapshot)
        if seed == "b":
            (snapshot / "model.safetensors").unlink()
            torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(seed * 40)
    assert PoNetModel.from_pretrained("org/bert").config.hidden_size == 8
    assert PoNetModel.from_pretrained("org/bert", revision="other").config.hidden_size == 33
    for name, message in (
        ("org/none", "org/none: no such folder, and the hub does not give it: .*$"),
        ("a/b/c", "a/b/c: no such folder, expected a model folder$"),
        ("./none", "no such folder, expected a model folder$"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            PoNetModel.from_pretrained(name)
        assert "\n" not in str(caught.value)


def bert_folder(folder: Path, **config) -> Path:
    """As published long ago: a cased `vocab.txt` alone, special tokens not at 101 and 102."""
    published("Bert", "ForPreTraining").save_pretrained(folder)
    words = [*SPECIAL_TOKENS, "The", "the", "cat", "##s", *(f"w{n}" for n in range(30))]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return folder


def test_bert_with_a_cased_vocabulary_is_fine_tuned(tmp_path, caplog):
    folder = bert_folder(tmp_path / "bert")
    assert load_tokenizer(folder).encode("The cats").tokens[1:-1] == ["The", "cat", "##s"]
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.config.cls_token_id, checkpoint.config.sep_token_id) == (2, 3)
    config = parse_glue(["--checkpoint", str(folder), "--max-length", "100"])
    (settings,) = config.runs_of(TASKS["mrpc"], 100, "cpu")
    caplog.clear()
    model = build_classifier(checkpoint, settings, 3)
    assert not warnings_of(caplog)
    expected = PoNetForSequenceClassification.from_pretrained(
        folder, max_position_embeddings=100, num_labels=3
    )
    for name, parameter in expected.ponet.named_parameters():
        assert torch.equal(model.ponet.get_parameter(name), parameter), name


def test_pretraining_goes_on_from_a_checkpoint(tmp_path):
    folder = bert_folder(tmp_path / "bert")
    flags = ["--config", "debug", "--checkpoint", str(folder), "--seq-len", "64"]
    config, _ = parse_pretrain(flags)
    assert (config.mixer, config.hidden_size, config.seq_len) == ("attention", 33, 64)
    tokenizer = load_tokenizer(config.vocab)
    model = build_model(config, tokenizer, torch.device("cpu"))
    start = PoNetForPreTraining.from_pretrained(folder)
    changed = {"ponet.embeddings.position.weight", "sso_head.weight", "sso_head.bias"}
    for name, parameter in model.named_parameters():
        if name not in changed:
            assert torch.equal(parameter, start.get_parameter(name)), name
    table = start.ponet.embeddings.position.weight
    tiled = model.ponet.embeddings.position.weight
    assert torch.equal(tiled, table[torch.arange(64) % POSITIONS])
    assert model.training
    assert (model.config.num_sentence_labels, model.config.hidden_dropout_prob) == (3, 0.1)
    assert model.config.attention_probs_dropout_prob == 0.1
    without, _ = parse_pretrain([*flags, "--attention-probs-dropout-prob", "0"])
    assert (
        build_model(without, tokenizer, torch.device("cpu"))
        .ponet.encoder.layers[0]
        .mixer.dropout_prob
        == 0
    )
    # shorter than the table: nothing is lost
    short, _ = parse_pretrain([*flags, "--seq-len", "16", "--objective", "mlm+nsp"])
    kept = build_model(short, tokenizer, torch.device("cpu"))
    assert torch.equal(kept.ponet.embeddings.position.weight, table)
    assert torch.equal(kept.sso_head.weight, start.sso_head.weight)
    # a resumed run has the same model, from wherever it is resumed
    run = tmp_path / "run"
    run.mkdir()
    settings = {n: x for n, x in vars(config).items() if n != "resume"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"data": ["builtin"]}))
    resumed, _ = parse_pretrain(["--resume", str(run)])
    again = build_model(resumed, tokenizer, torch.device("cpu"))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden-size 32", "--hidden-size cannot change on --checkpoint: .*has 33, found 32"),
        ("--mixer ponet", "--mixer cannot change on --checkpoint: .*has 'attention', found"),
        ("--vocab large.txt", "--vocab large.txt has 119 tokens, --checkpoint bert 90"),
    ],
)
def test_flags_that_contradict_a_checkpoint(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    bert_folder(Path("bert"))
    words = [*WORDS, *(f"w{number}" for number in range(119 - len(WORDS)))]
    Path("large.txt").write_text("".join(f"{word}\n" for word in words))
    assert parse_pretrain(["--checkpoint", "bert", "--hidden-size", "33"])
    with pytest.raises(UsageError, match=message):
        parse_pretrain(["--checkpoint", "bert", *flags.split()])
