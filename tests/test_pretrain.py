"""The pre-training program end to end on small real text: results, resuming, failing."""

import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ponet import PoNetForMaskedLM, PoNetForPreTraining
from ponet.checkpoint import CheckpointError
from ponet.run.cli import UsageError
from pretrain.engine import Engine, engine_config, learning_rate_factor, read_deepspeed_file
from pretrain.settings import PRESETS, PretrainConfig, parse

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "pretrain" / "run.py"
TINY = (
    "--config=debug --vocab-size=400 --hidden-size=32 --intermediate-size=64 --seq-len=48 "
    "--batch-tokens=768 --micro-batch-tokens=384 --eval-tokens=1500 --validation-fraction=0.1 "
    "--steps=12 --eval-every=4 --log-every=1"
).split()
# with the launchers of this installation
PATHS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
ENVIRONMENT = os.environ | {"PATH": PATHS}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with real text, the topics of Python's own manual, and a token cache."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("pretrain")
    documents = [" ".join(text.split()) for text in topics.values() if len(text) > 800]
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "topics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(workplace: Path, *flags: str) -> list[str]:
    text = [f"--data={workplace / 'topics.jsonl'}", f"--cache-dir={workplace / 'cache'}"]
    return [sys.executable, str(RUN), *TINY, *text, *flags]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    options |= {"capture_output": True, "text": True, "timeout": 240}
    return subprocess.run(arguments, env=ENVIRONMENT, **options)


def run_limited(size: int, arguments: list[str]) -> subprocess.CompletedProcess:
    """A limit on the size of files, set in the child, stands in for a full disk."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return run(arguments, preexec_fn=limit)


def resume(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    return run([sys.executable, str(RUN), f"--resume={folder}", *flags])


def result_of(done: subprocess.CompletedProcess) -> dict:
    """The one JSON document on stdout; DeepSpeed's launcher logs around it."""
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(line)
    assert json.loads(Path(result["run"], "result.json").read_text()) == result
    return result


def metrics_of(folder: Path) -> dict[tuple[str, int], float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(e["kind"], e["step"]): e["loss"] for e in entries}


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics_of(one) == metrics_of(other)
    expected = load_file(other / "model" / "model.safetensors")
    for name, tensor in load_file(one / "model" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def whole_run(workplace) -> tuple[Path, subprocess.CompletedProcess]:
    """An uninterrupted run, which others are compared with."""
    folder = workplace / "whole"
    return folder, run(command(workplace, f"--output-dir={folder}"))


def test_results_model_and_records(whole_run):
    folder, done = whole_run
    result = result_of(done)
    assert done.stdout.count("\n") == 1, "stdout holds the result alone"
    for name in ("mlm_accuracy", "mlm_baseline", "sso_accuracy", "sso_baseline"):
        assert 0 <= result[name] <= 1
    assert result["steps"] == 12
    # packing fills the batches: 12 steps of 768 tokens
    assert 0.95 * 12 * 768 <= result["tokens"] <= 12 * 768
    assert result["tokens_per_second"] > 0
    assert result["seconds"] > 0
    assert result["mlm_loss"] < math.log(400) - 0.1, "no better than guessing among 400 tokens"
    checkpoint = Path(result["checkpoint"])
    model = PoNetForPreTraining.from_pretrained(checkpoint)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    out = PoNetForMaskedLM.from_pretrained(checkpoint)(torch.tensor([[2, 50, 4, 60, 3]]))
    assert out.logits.isfinite().all()
    assert (checkpoint / "tokenizer.json").is_file()
    kinds = [kind for kind, _ in metrics_of(folder)]
    assert (kinds.count("train"), kinds.count("eval")) == (12, 3)
    assert list((folder / "tensorboard").glob("events.out.*"))
    assert json.loads((folder / "run.json").read_text())["processes"] == 1
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names[-2:] == ["step-00000008", "step-00000012"]
    assert len(names) <= 3


def test_resume_after_kill_is_bit_for_bit(workplace, whole_run):
    folder, log = workplace / "killed", workplace / "killed.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(workplace, f"--output-dir={folder}", "--num-workers=2"),
            env=ENVIRONMENT,
            stderr=stream,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while "step 6/12" not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "model").exists()
    result_of(resume(folder))
    assert_same_run(folder, whole_run[0])


def test_two_processes_under_the_deepspeed_launcher(workplace, whole_run):
    """The same examples in the same global batches: losses differ by summation order alone."""
    folder = workplace / "two"
    launcher = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}"]
    done = run([*launcher, *command(workplace)[1:], f"--output-dir={folder}"])
    result = result_of(done)
    expected, losses = metrics_of(whole_run[0]), metrics_of(folder)
    assert losses.keys() == expected.keys()
    assert all(abs(losses[key] - expected[key]) < 1e-4 for key in losses)
    assert result["tokens"] == result_of(whole_run[1])["tokens"]


def test_deepspeed_alone_has_the_same_bits_and_continues_a_run_without_it(workplace, whole_run):
    """As it is where one process uses no feature of DeepSpeed, and where it does."""
    folder = workplace / "continued"
    shutil.copytree(whole_run[0], folder)
    for late in ("checkpoints/step-00000012", "model"):
        shutil.rmtree(folder / late)
    with_deepspeed = (
        "import sys, pretrain.engine\n"
        "pretrain.engine.needs_deepspeed = lambda *_: True\n"
        "import pretrain.run\n"
        "pretrain.run.main()\n"
        "assert 'deepspeed' in sys.modules\n"
    )
    result_of(run([sys.executable, "-c", with_deepspeed, f"--resume={folder}"]))
    assert_same_run(folder, whole_run[0])


def test_one_process_needs_no_deepspeed_and_utilisation_needs_a_formula(workplace, whole_run):
    # None hides a module from `import` and from `find_spec`
    hidden = "import sys\nsys.modules['deepspeed'] = None\nimport pretrain.run\npretrain.run.main()"
    folder = workplace / "without"
    arguments = command(workplace, f"--output-dir={folder}", "--steps=4", "--mixer=linear")[2:]
    result_of(run([sys.executable, "-c", hidden, *arguments, "--warmup-steps=1"]))
    assert json.loads((folder / "run.json").read_text())["deepspeed"] is None
    names, others = (
        set(json.loads((path / "metrics.jsonl").read_text().splitlines()[0]))
        for path in (folder, whole_run[0])
    )
    assert others - names == {"flops_utilisation"}
    sharded = command(workplace, f"--output-dir={workplace / 'sharded'}", "--zero-stage=1")[2:]
    done = run([sys.executable, "-c", hidden, *sharded])
    assert done.returncode == 2
    assert "need DeepSpeed, which is not installed" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "flags",
    [["--zero-stage=2", "--precision=bf16"], ["--precision=bf16-residual", "--objective=mlm"]],
)
def test_variants_run_and_resume(workplace, flags):
    folder = workplace / f"variant{''.join(flags)}"
    short = ["--steps=4", "--eval-every=2", f"--output-dir={folder}"]
    first = result_of(run(command(workplace, *flags, *short)))
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert result_of(resume(folder))["loss"] == first["loss"]
    assert ("sso_accuracy" in first) is ("--objective=mlm" not in flags)


def test_resume_goes_on_with_the_text_it_began_with(workplace, whole_run):
    """The source may change: the built-in text does with every package that is installed."""
    source, cache = workplace / "changing.jsonl", workplace / "own-cache"
    shutil.copy(workplace / "topics.jsonl", source)
    folder = workplace / "changing"
    flags = [f"--data={source}", f"--cache-dir={cache}", "--steps=4"]
    first = result_of(run(command(workplace, *flags, f"--output-dir={folder}")))
    source.write_text(json.dumps({"text": "Another text."}) + "\n")
    assert result_of(resume(folder))["loss"] == first["loss"]
    shutil.rmtree(cache)
    done = resume(folder)
    assert done.returncode != 0
    assert "the text changed since the run began" in done.stderr


def test_other_steps_on_resume_are_said_to_bend_the_schedule(workplace, whole_run):
    folder = workplace / "longer"
    shutil.copytree(whole_run[0], folder)
    done = resume(folder, "--steps=13")
    assert result_of(done)["steps"] == 13
    assert "--steps 13, but the run began with 12: from here on the learning rate" in done.stderr


def test_no_path_of_the_checkout_is_recorded(whole_run, tmp_path):
    text = (whole_run[0] / "config.yaml").read_text()
    assert str(ROOT) not in text
    # runs of earlier versions recorded one
    old = text.replace("deepspeed_config: null", "deepspeed_config: /gone/pretrain/deepspeed.json")
    assert old != text
    (tmp_path / "config.yaml").write_text(old)
    assert parse([f"--resume={tmp_path}"])[0].deepspeed_config is None


def test_damaged_checkpoints(workplace, whole_run):
    folder = workplace / "damaged"
    shutil.copytree(whole_run[0], folder)
    newest = folder / "checkpoints" / "step-00000012" / "state.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[:-100])
    done = resume(folder)
    assert "step-00000012/state.pt: damaged checkpoint" in done.stderr
    assert "resuming from" in done.stderr
    assert result_of(done)["loss"] == result_of(whole_run[1])["loss"]
    for path in folder.glob("checkpoints/step-*/manifest.json"):
        path.write_text("{")
    done = resume(folder)
    assert done.returncode == 1
    assert "pretrain: error:" in done.stderr
    assert "damaged checkpoint" in done.stderr


def test_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    config = PretrainConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    engine = Engine(config, PoNetForPreTraining(config.model_config(100, 0, 1, 2)))
    with pytest.raises(CheckpointError, match=r"holds no state\.pt; the version"):
        engine.load(tmp_path)


def test_full_disk_names_the_folder_and_leaves_nothing_half_written(workplace):
    folder = workplace / "full"
    done = run_limited(400_000, command(workplace, f"--output-dir={folder}", "--hidden-size=64"))
    assert done.returncode == 1
    for message in ("pretrain: error:", "cannot be written", f"{folder}/checkpoints/step-00000004"):
        assert message in done.stderr
    assert not list((folder / "checkpoints").iterdir())
    assert not (folder / "model").exists()


@pytest.mark.parametrize(("limit", "name"), [(8_000, "tokenizer.json"), (30_000, "tokens.bin")])
def test_full_disk_while_preparing_names_the_file(workplace, limit, name):
    cache, folder = workplace / f"small-cache-{limit}", workplace / f"full-{limit}"
    flags = [f"--output-dir={folder}", f"--cache-dir={cache}"]
    done = run_limited(limit, command(workplace, *flags))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pretrain: error:")
    assert "free" in last
    assert name in last
    assert not folder.exists()
    assert not [path for path in cache.rglob(name) if path.is_file()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param([], "loss is nan in step", id="at-a-line-of-the-log"),
        pytest.param(
            ["--log-every=100", "--eval-every=3"],
            "loss is nan in steps 1 to 3 (mlm nan",
            id="before-a-checkpoint",
        ),
        # the losses of a step are those before it: its evaluation tells
        pytest.param(
            ["--eval-every=1", "--warmup-steps=0"],
            "loss is nan in the evaluation after step 1 (mlm nan",
            id="ruined-by-the-last-step",
        ),
    ],
)
def test_a_diverging_run_says_where_and_saves_nothing(workplace, flags, message):
    folder = workplace / f"nan{''.join(flags)}"
    done = run(command(workplace, f"--output-dir={folder}", "--learning-rate=1e30", *flags))
    assert done.returncode == 1
    assert message in done.stderr
    assert "--learning-rate" in done.stderr
    assert not list(folder.glob("checkpoints/step-*"))


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        # other bad files are refused likewise: see the tests of sources
        ("b.txt", b"a\0b", [], "b.txt"),
        ("one.txt", b"One sentence.", [], "documents"),
        ("topics.jsonl", None, ["--batch-tokens=3840000"], "fills no global batch"),
        ("nothing.txt", None, [], "nothing.txt"),
    ],
)
def test_bad_text(workplace, name, content, flags, message):
    path, target = workplace / name, workplace / f"bad-{name}"
    if content is not None:
        path.write_bytes(content)
    done = run(command(workplace, f"--data={path}", *flags, f"--output-dir={target}"))
    assert done.returncode != 0
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pretrain: error:")
    assert message in last
    assert not target.exists(), "a corrected command must be able to use the folder"


def test_occupied_output_folder(workplace, whole_run):
    done = run(command(workplace, f"--output-dir={whole_run[0]}"))
    assert done.returncode == 2
    assert "is not an empty folder" in done.stderr


def test_settings_of_a_run_cannot_change_on_resume(whole_run):
    folder = whole_run[0]
    for flag, message in [
        ("--hidden-size=64", "--hidden-size cannot change on --resume: the run has 32"),
        ("--compile", "--compile cannot change on --resume"),
    ]:
        with pytest.raises(UsageError, match=message):
            parse([f"--resume={folder}", flag])
    config, _ = parse([f"--resume={folder}", "--num-workers=3"])
    assert (config.num_workers, config.hidden_size) == (3, 32)
    with pytest.raises(UsageError, match="holds no config"):
        parse([f"--resume={folder.parent}"])


def test_presets_parse_and_base_is_as_published():
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    assert names == ["base", "debug", "demo", "small"]
    configs = {name: parse([f"--config={name}"])[0] for name in names}
    base = configs["base"]
    assert (base.steps, base.batch_tokens, base.warmup_steps) == (340_000, 192 * 512, 5000)
    model = base.model_config(30522, 0, 101, 102)
    with torch.device("meta"):
        count = sum(p.numel() for p in PoNetForPreTraining(model).parameters())
    assert count == 124_281_405
    assert parse([])[1] == "demo"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config=huge", "no preset or file 'huge'; the presets are base, debug"),
        ("--steps=many", "--steps: expected int, found 'many'"),
        ("--precision=fp8", "--precision: expected one of fp32, bf16, bf16-residual, fp16"),
        ("--batch-tokens=1000 --micro-batch-tokens=600", "--batch-tokens 1000 is not a mult"),
        ("--validation-fraction=nan", "--validation-fraction must be between 0 and 1, found nan"),
        ("--log-every=0", "--log-every must be at least 1, found 0"),
        ("--zero-stage=3", "--zero-stage must be 0, 1 or 2, found 3"),
    ],
)
def test_bad_values_of_flags(flags, message):
    with pytest.raises(UsageError, match=message):
        parse(flags.split())


def test_unknown_flags_and_own_files(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--stepz=3"])
    assert error.value.code == 2
    assert "--stepz" in capsys.readouterr().err
    file = tmp_path / "own.yaml"
    file.write_text("learning_rat: 1e-4\n")
    message = "unknown key 'learning_rat', did you mean 'learning_rate'"
    with pytest.raises(UsageError, match=message):
        parse([f"--config={file}"])
    file.write_text("learning_rate: 1e-4\nsteps: 3\n")
    config, name = parse([f"--config={file}", "--steps=5"])
    assert (config.learning_rate, config.steps, name) == (1e-4, 5, "own")
    assert parse(["--seed=12345678901234567"])[0].seed == 12345678901234567


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"gradient_clipping": 1.0}', "gradient_clipping is set by --max-grad-norm"),
        ('{"zero_optimization": {"stage": 2}}', "stage is set by --zero-stage"),
        ("{", "cannot be read"),
    ],
)
def test_deepspeed_file_is_checked(tmp_path, content, message):
    file = tmp_path / "engine.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_deepspeed_file(file)


def test_engine_configuration():
    config = PretrainConfig(batch_tokens=8192, micro_batch_tokens=1024, max_grad_norm=0.5)
    content = engine_config(config, world_size=4)
    assert content["gradient_accumulation_steps"] == 2
    assert content["gradient_clipping"] == 0.5
    with pytest.raises(UsageError, match="8 micro-batches of 1024, which 3 processes cannot share"):
        engine_config(config, world_size=3)


def test_learning_rate_schedule():
    config = PretrainConfig(steps=100, warmup_steps=10)
    factor = learning_rate_factor(config)
    assert [factor(0), factor(9), factor(10), factor(55), factor(100)] == [0.1, 1.0, 1.0, 0.5, 0.0]
    constant = learning_rate_factor(PretrainConfig(steps=100, schedule="constant"))
    assert constant(99) == 1.0
