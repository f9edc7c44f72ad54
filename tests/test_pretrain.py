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
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file

from ponet import PoNetForPreTraining
from ponet.run.cli import UsageError
from ponet.run.hub import import_datasets
from pretrain.engine import check_engine, engine_config, learning_rate_factor
from pretrain.run import warn_of_schedule
from pretrain.settings import PRESETS, PretrainConfig, parse

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [sys.executable, str(ROOT / "pretrain" / "run.py")]
TINY = (
    "--config=debug --vocab-size=400 --hidden-size=32 --intermediate-size=64 --seq-len=128 "
    "--batch-tokens=768 --micro-batch-tokens=384 --eval-tokens=1500 --validation-fraction=0.1 "
    "--steps=12 --eval-every=4 --log-every=1 --data=topics.jsonl --cache-dir=cache"
).split()
MAIN = ("import pretrain.run", "pretrain.run.main()")
NAN = "--learning-rate=1e30"
WHOLE = Path("whole")


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory):
    """A working directory with real text, the topics of Python's own manual."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pretrain"))
        # with the launchers of this installation
        patch.setenv("PATH", sysconfig.get_path("scripts"), prepend=os.pathsep)
        documents = [" ".join(text.split()) for text in topics.values() if len(text) > 800]
        lines = [json.dumps({"text": document}) for document in documents]
        Path("topics.jsonl").write_text("\n".join(lines))
        yield


def run(*flags: str, by: list[str] = PROGRAM, size: int | None = None):
    """Run the program; a limit on the size of files stands in for a full disk."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size)) if size else None
    options = {"capture_output": True, "text": True, "timeout": 240, "preexec_fn": limit}
    return subprocess.run([*by, *flags], **options)


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(("import sys", *lines))]


def begin(folder: str | Path, *flags: str, **options):
    """A tiny run; of flags that come twice the last counts."""
    return run(*TINY, f"--output-dir={folder}", *flags, **options)


def result_of(done: subprocess.CompletedProcess) -> dict:
    """The one JSON document on stdout; DeepSpeed's launcher logs around it."""
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result = json.loads(line)
    assert json.loads(Path(result["run"], "result.json").read_text()) == result
    return result


def error_of(done: subprocess.CompletedProcess, status: int = 1) -> str:
    assert (done.returncode, done.stdout) == (status, "")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pretrain: error:")
    return last


def metrics_of(folder: str | Path) -> dict[tuple[str, int], float]:
    entries = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return {(e["kind"], e["step"]): e["loss"] for e in entries}


def assert_same_as_whole(folder: str) -> None:
    assert metrics_of(folder) == metrics_of(WHOLE)
    expected = load_file(WHOLE / "model" / "model.safetensors")
    for name, tensor in load_file(Path(folder, "model", "model.safetensors")).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def whole_run(workplace) -> dict:
    """The result of an uninterrupted run, which others are compared with."""
    done = begin(WHOLE)
    assert done.stdout.count("\n") == 1, "stdout holds the result alone"
    return result_of(done)


def test_results_model_and_records(whole_run):
    for name in ("mlm_accuracy", "mlm_baseline", "sso_accuracy", "sso_baseline"):
        assert 0 <= whole_run[name] <= 1
    assert whole_run["steps"] == 12
    # packing fills the batches: 12 steps of 768 tokens
    assert 0.95 * 12 * 768 <= whole_run["tokens"] <= 12 * 768
    assert whole_run["mlm_loss"] < math.log(400) - 0.1, "no better than guessing among 400 tokens"
    checkpoint = Path(whole_run["checkpoint"])
    model = PoNetForPreTraining.from_pretrained(checkpoint)
    assert whole_run["parameters"] == sum(p.numel() for p in model.parameters())
    assert (checkpoint / "tokenizer.json").is_file()
    kinds = [kind for kind, _ in metrics_of(WHOLE)]
    assert (kinds.count("train"), kinds.count("eval")) == (12, 3)
    assert list((WHOLE / "tensorboard").glob("events.out.*"))
    assert json.loads((WHOLE / "run.json").read_text())["processes"] == 1
    assert str(ROOT) not in (WHOLE / "config.yaml").read_text()
    # the best is one of the two newest, or kept beside them
    names = sorted(path.name for path in (WHOLE / "checkpoints").iterdir())
    assert names[-2:] == ["step-00000008", "step-00000012"]
    assert len(names) <= 3


def test_resume_after_kill_is_bit_for_bit(whole_run):
    flags = [*TINY, "--output-dir=killed", "--num-workers=2"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*PROGRAM, *flags], start_new_session=True, **streams) as process:
        assert any("step 6/12" in line for line in process.stderr)
        os.killpg(process.pid, signal.SIGKILL)
    assert not Path("killed", "model").exists()
    result_of(run("--resume=killed"))
    assert_same_as_whole("killed")


def test_two_processes_under_the_deepspeed_launcher(whole_run):
    """The same examples in the same global batches: losses differ by summation order alone."""
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    launcher = ["deepspeed", "--num_gpus=2", f"--master_port={port}", PROGRAM[1]]
    assert result_of(begin("two", by=launcher))["tokens"] == whole_run["tokens"]
    assert metrics_of("two") == pytest.approx(metrics_of(WHOLE), abs=1e-4, rel=0)


def test_deepspeed_alone_has_the_same_bits_and_continues_a_run_without_it(whole_run):
    """As it is where one process uses no feature of DeepSpeed, and where it does."""
    shutil.copytree(WHOLE, "continued")
    for late in ("checkpoints/step-00000012", "model"):
        shutil.rmtree(Path("continued", late))
    needed = ("import pretrain.engine", "pretrain.engine.needs_deepspeed = lambda *_: True")
    program = python(*needed, *MAIN, "assert 'deepspeed' in sys.modules")
    result_of(run("--resume=continued", by=program))
    assert_same_as_whole("continued")


def test_one_process_needs_no_deepspeed(workplace):
    # None hides a module from `import` and from `find_spec`
    program = python("sys.modules['deepspeed'] = None", *MAIN)
    # a mixer whose operations nobody has counted
    flags = ["--steps=4", "--warmup-steps=1", "--mixer=linear"]
    result_of(begin("without", *flags, by=program))
    assert json.loads(Path("without", "run.json").read_text())["deepspeed"] is None
    assert "flops" not in Path("without", "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "flags", ["--zero-stage=2 --precision=bf16", "--precision=bf16-residual --objective=mlm"]
)
def test_variants_run_and_resume(tmp_path, flags):
    first = result_of(begin(tmp_path, *flags.split(), "--steps=4", "--eval-every=2"))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    assert result_of(run(f"--resume={tmp_path}"))["loss"] == first["loss"]
    assert ("sso_accuracy" in first) is ("--objective=mlm" not in flags)


def test_resume_goes_on_with_the_text_it_began_with():
    """The source may change: the built-in text does with every package that is installed."""
    source = Path(shutil.copy("topics.jsonl", "changing.jsonl"))
    flags = [f"--data={source}", "--cache-dir=own-cache", "--steps=4"]
    first = result_of(begin("changing", *flags))
    source.write_text(json.dumps({"text": "Another text."}) + "\n")
    assert result_of(run("--resume=changing"))["loss"] == first["loss"]
    shutil.rmtree("own-cache")
    assert "the text changed since the run began" in error_of(run("--resume=changing"), status=2)


def test_schedules_that_take_another_course_are_said(whole_run, caplog):
    debug = "--config=debug --steps="
    for flags in ("--resume=whole --steps=13", f"{debug}3", f"{debug}5"):
        warn_of_schedule(parse(flags.split())[0])
    longer, never = caplog.messages
    assert "--steps 13, but the run began with 12: from here on the learning rate" in longer
    assert "--warmup-steps 5, but the run ends after 3 steps" in never
    constant = PretrainConfig(steps=100, schedule="constant")
    assert [learning_rate_factor(constant, step) for step in (49, 99)] == [0.5, 1.0]


def test_damaged_checkpoints(whole_run):
    folder = Path(shutil.copytree(WHOLE, "damaged"))
    newest = folder / "checkpoints" / "step-00000012" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    done = run(f"--resume={folder}")
    assert "step-00000012/state.pt: damaged checkpoint" in done.stderr
    assert "resuming from" in done.stderr
    assert result_of(done)["loss"] == whole_run["loss"]
    for path in folder.glob("checkpoints/step-*/manifest.json"):
        path.write_text("{")
    assert "damaged checkpoint" in error_of(run(f"--resume={folder}"))


@pytest.mark.parametrize(
    ("flag", "size", "message"),
    [
        # other bad files are refused likewise: see the tests of sources
        ("--data=one.txt", None, "documents"),
        ("--data=nothing.txt", None, "nothing.txt"),
        ("--batch-tokens=3840000", None, "fills no global batch"),
        ("--cache-dir=small", 8_000, "tokenizer.json"),
        ("--cache-dir=small", 30_000, "tokens.bin"),
    ],
)
def test_what_cannot_begin_is_said_and_leaves_nothing(flag, size, message):
    Path("one.txt").write_text("One sentence.")
    assert message in error_of(begin("refused", flag, size=size))
    assert not Path("refused").exists(), "a corrected command must be able to use the folder"
    assert not list(Path("small").rglob(message))


@pytest.mark.parametrize(
    ("flags", "size", "message"),
    [
        ("--hidden-size=64", 400_000, "/checkpoints/step-00000004: cannot be written"),
        (f"{NAN} --log-every=9 --eval-every=3", None, "loss is nan in steps 1 to 3 ("),
        # the losses of a step are those before it: its evaluation tells
        (f"{NAN} --eval-every=1 --warmup-steps=0", None, "nan in the evaluation after step 1 ("),
    ],
    ids=["full-disk", "nan-before-a-checkpoint", "ruined-by-the-last-step"],
)
def test_a_run_that_fails_says_where_and_leaves_no_checkpoint(tmp_path, flags, size, message):
    assert message in error_of(begin(tmp_path, *flags.split(), size=size))
    assert not list((tmp_path / "checkpoints").glob("*"))
    assert not (tmp_path / "model").exists()


def test_what_cannot_be_resumed_or_begun_in_the_folder_of_a_run(whole_run):
    assert "is not an empty folder" in error_of(begin(WHOLE), status=2)
    for flags, message in [
        ("--resume=whole --hidden-size=64", "--hidden-size cannot change on --resume: the run has"),
        ("--resume=whole --compile", "--compile cannot change on --resume"),
        ("--resume=cache", "holds no config"),
    ]:
        with pytest.raises(UsageError, match=message):
            parse(flags.split())
    config, _ = parse(["--resume=whole", "--num-workers=3"])
    assert (config.num_workers, config.hidden_size) == (3, 32)


def test_a_hub_out_of_reach_is_tried_once(monkeypatch):
    config = import_datasets().config
    monkeypatch.setattr(config, "HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("ponet.run.hub.getproxies", dict)
    assert import_datasets().config.HF_HUB_OFFLINE


def test_presets_parse_and_base_is_as_published():
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    assert names == ["base", "debug", "demo", "small"]
    base, *_ = [parse([f"--config={name}"])[0] for name in names]
    assert (base.steps, base.batch_tokens, base.warmup_steps) == (340_000, 192 * 512, 5000)
    with torch.device("meta"):
        model = PoNetForPreTraining(base.model_config(30522, 0, 101, 102))
    assert sum(p.numel() for p in model.parameters()) == 124_281_405
    assert parse([])[1] == "demo"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config=huge", "no preset or file 'huge'; the presets are base, debug"),
        ("--steps=many", "--steps: expected int, found 'many'"),
        ("--precision=fp8", "--precision: expected one of fp32, bf16, bf16-residual, fp16"),
        ("--batch-tokens=999", "--batch-tokens must be a multiple of --micro-batch-tokens 4096"),
        ("--seq-len=9999", "--micro-batch-tokens must be at least --seq-len 9999, found 4096"),
        ("--validation-fraction=nan", "--validation-fraction must be between 0 and 1, found nan"),
        ("--attention-probs-dropout-prob=1", "must be at least 0 and below 1, found 1.0"),
        ("--zero-stage=3", "--zero-stage must be 0, 1 or 2, found 3"),
    ],
)
def test_bad_values_of_flags(flag, message):
    with pytest.raises(UsageError, match=message):
        parse([flag])


def test_help_unknown_flags_and_own_files(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help", "--config=small"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--config PRESET base, debug, demo, small, or a YAML file [demo]" in shown
    assert "--steps INT Optimizer steps. [2000]" in shown
    with pytest.raises(SystemExit, match="2"):
        parse(["--stepz=3"])
    assert "--stepz" in capsys.readouterr().err
    file = tmp_path / "own.yaml"
    file.write_text("learning_rat: 1e-4\n")
    with pytest.raises(UsageError, match="'learning_rat', did you mean 'learning_rate'"):
        parse([f"--config={file}"])
    file.write_text("learning_rate: 1e-4\nsteps: 3\n")
    config, name = parse([f"--config={file}", "--steps=5", "--seed=12345678901234567"])
    assert (config.learning_rate, config.steps, name) == (1e-4, 5, "own")
    assert config.seed == 12345678901234567


def test_engine_configuration(tmp_path, monkeypatch):
    config = PretrainConfig(batch_tokens=8192, micro_batch_tokens=1024, max_grad_norm=0.5)
    content = engine_config(config, world_size=4)
    assert content["gradient_accumulation_steps"] == 2
    assert content["gradient_clipping"] == 0.5
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    file = tmp_path / "engine.json"
    for text, changes, message in [
        ("{}", {"micro_batch_tokens": 8192}, "makes 1 micro-batches of 8192, which 2 processes"),
        ('{"gradient_clipping": 1.0}', {}, "gradient_clipping is set by --max-grad-norm"),
        ('{"zero_optimization": {"stage": 2}}', {}, "zero_optimization.stage is set by --zero"),
        ("{", {}, "cannot be read"),
        ("{}", {"precision": "fp16"}, "--precision fp16 needs a GPU"),
        ("{}", {"zero_stage": 1}, "need DeepSpeed, which is not installed"),
    ]:
        file.write_text(text)
        sizes = {"batch_tokens": 8192, "micro_batch_tokens": 1024}
        config = PretrainConfig(deepspeed_config=str(file), **(sizes | changes))
        with pytest.raises(UsageError, match=message):
            check_engine(config, 2, torch.device("cpu"))
