"""README and docs as a newcomer uses them: commands and Python run in their order on tiny data."""

import contextlib
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

import glue.settings
import lra.settings
import pretrain.settings
from ponet.tokenizer import SPECIAL_TOKENS
from tests.fork_server import run_program
from tests.test_glue_run import official_files, put

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/pretraining.md",
    "docs/lra.md",
    "docs/glue.md",
    "docs/benchmarks.md",
    "docs/kernels.md",
    "docs/differences.md",
    "docs/pooling.md",
    # last, because it adds a mixer to the library
    "docs/your_own_mixer.md",
)
PARSERS = {
    "pretrain/run.py": pretrain.settings.parse,
    "lra/run.py": lra.settings.parse,
    "glue/run.py": glue.settings.parse,
}

# a program's own flags stay, and of flags that come twice the last counts
SMALLER = {
    r"pretrain/run.py": "--steps 2 --eval-every 2 --eval-tokens 512 --warmup-steps 1 --seq-len 64 "
    "--batch-tokens 512 --micro-batch-tokens 256 --max-characters 200000 --vocab-size 600 "
    "--hidden-size 32 --num-hidden-layers 3 --num-attention-heads 2 --intermediate-size 64 "
    "--validation-fraction 0.1 --cache-dir cache",
    r"pretrain/run.py (?!.*(--data|runs/demo))": "--data data/corpus",
    r"lra/prepare.py": "--workers 1",
    r"lra/prepare.py --task listops pathfinder": "--num-examples 60",
    r"lra/run.py": "--steps 2 --batch-size 2 --eval-every 2 --eval-batches 1 --test-examples 4 "
    "--seeds 1",
    r"lra/run.py .*--pretrain-epochs": "--pretrain-epochs 0.1",
    # of own tasks, whose data are small, the next command names the folder
    r"glue/run.py (?!.*--train-file)": "--epochs 1 --max-train-examples 16 --max-length 32",
    r"speed_memory.py": "--seq-len 64 --batch-size 1 --rounds 1 --budget 1",
    r"speed_memory.py --model": "--layers 1",
    r"op_speed.py": "--batch-size 2 --seq-len 40 --width 24 --heads 3 --repeats 1",
    r"input_pipeline.py": "--max-characters 200000 --repeats 1",
}
"""Flags that make the commands small that a pattern finds, but for --resume and --quick."""
ONLY_PARSED = {
    r"^pip ": "installs packages",
    r"^pytest": "is what runs here",
    r"--data wikitext|--checkpoint bert-": "reads the hub over the network",
    r"--zero-stage 2": "needs GPUs",
    r"ablation.py": "18 runs; it has a test of its own",
    r"gpu_report.py": "needs a GPU; with --tiny it has a test of its own",
}
"""Commands that do not run here, by pattern, and why."""
SLOW = {
    r"--num_gpus 2|torchrun|--jobs 2": "several processes",
    r"lra/run.py --task all": "15 runs",
    r"glue/run.py --task all": "9 tasks",
    r"speed_memory.py(?!.* average )": "a process per mixer and length",
    r"compile_report": "a minute",
}
"""Commands that run with --run-slow only, by pattern, and why."""


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks of a page."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def commands_in(block: str) -> list[str]:
    """Commands of a `sh` block, without comments."""
    lines = [re.sub(r"\s+# .*", "", line) for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


SHELL = [block for page in PAGES for kind, block in blocks_of(page) if kind == "sh"]
IN_BLOCKS = [command for block in SHELL for command in commands_in(block)]
IN_TABLES = re.findall(r"`((?:python|deepspeed) [^`]+)`", (ROOT / "README.md").read_text())
ALL_COMMANDS = list(dict.fromkeys(IN_BLOCKS + IN_TABLES))


def found_in(command: str, patterns: dict[str, str]) -> list[str]:
    """The values of the patterns that are in a command."""
    return [value for pattern, value in patterns.items() if re.search(pattern, command)]


def sentences_of(page: str) -> list[str]:
    """Sentences of a page: real English for the tiny data."""
    text = re.sub(r"(?s:```.*?```)|\|.*\||[`*#\[\]]", "", (ROOT / page).read_text())
    found = (" ".join(s.split()) for s in re.split(r"(?<=[.:])\s", text))
    return [s.replace('"', "") for s in found if 30 < len(s) < 300]


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_corpus(data: Path) -> None:
    """Text to pre-train on, and a vocabulary."""
    for page in PAGES:
        for number, part in enumerate((ROOT / page).read_text().split("\n## ")):
            write(data / "corpus" / f"{Path(page).stem}-{number}.txt", [part])
    write(data / "notes.txt", sentences_of("docs/lra.md"))
    records = [json.dumps({"text": text}) for text in sentences_of("docs/glue.md")]
    (data / "more.jsonl.xz").write_bytes(lzma.compress("\n".join(records).encode()))
    words = sorted(set(re.findall("[a-z]{3,}", (ROOT / "README.md").read_text())))
    letters = [chr(i) for i in range(33, 127)]
    write(data / "vocab.txt", [*SPECIAL_TOKENS, *letters, *(f"##{x}" for x in letters), *words])


def write_examples(data: Path) -> None:
    """Texts to classify: which page is a sentence from? And the tasks of the paper."""
    rows = [(s, page) for page in ("kernels", "lra_speed") for s in sentences_of(f"docs/{page}.md")]
    table = pd.DataFrame(rows, columns=["text", "kind"]).groupby("kind").head(30)
    table.to_csv(data / "mine.csv", index=False)
    pairs = table.assign(title=table["text"], body=table["text"])
    pairs.to_csv(data / "pairs.csv", index=False)
    pairs.head().to_csv(data / "new_pairs.csv", index=False)
    write(data / "new.txt", table["text"].head().to_list())
    official_files(data)
    for split in ("train", "dev"):
        path = data / "hyperpartisan" / f"{split}.jsonl"
        put(path, 24, None, '{{"text": "{a}", "label": "{label}"}}', ("false", "true"))


def write_lra(data: Path) -> None:
    """Reviews, images and pairs of papers."""
    texts = sentences_of("docs/kernels.md")
    for split in ("train", "test"):
        for number, text in enumerate(texts[:40]):
            write(data / f"aclImdb/{split}/{('neg', 'pos')[number % 2]}/{number}_5.txt", [text])
        for name in lra.settings.TASKS["image"].class_names:
            folder = data / f"cifar10/{split}/{name}"
            folder.mkdir(parents=True)
            for number in range(2):
                Image.effect_noise((32, 32), 50).convert("RGB").save(folder / f"{number}.png")
    for split in ("train", "eval", "test"):
        rows = [f"{i % 2}\t{i}\t{i}\t{text}\t{text}" for i, text in enumerate(texts[:20])]
        write(data / f"aan/new_aan_pairs.{split}.tsv", rows)


@dataclass
class Newcomer:
    """Someone with a fresh clone and small data who follows the pages."""

    folder: Path
    is_patient: bool
    done: set[str] = field(default_factory=set)

    def follow(self, page: str) -> None:
        """Do what a page says, in its order; what another page said word for word is done."""
        for number, (kind, block) in enumerate(blocks_of(page)):
            commands = commands_in(block)
            if kind == "python":
                path = re.match(r"# (\S+\.py)\n", block)
                name = path[1] if path else f"{Path(page).stem}_{number}.py"
                (self.folder / name).write_text(block)
                commands = [] if path else [f"python {name}"]
            for command in commands:
                skipped = found_in(command, ONLY_PARSED | ({} if self.is_patient else SLOW))
                if not skipped and command not in self.done:
                    self.done.add(command)
                    self._do(command)

    def _do(self, command: str) -> None:
        words = shlex.split(command)
        if not re.search("--resume|--quick", command):
            words += shlex.split(" ".join(found_in(command, SMALLER)))
        # a launcher with one process starts what follows
        if words[0] == "python" or (words[0] == "deepspeed" and not self.is_patient):
            output = self.folder / "output"
            status = run_program(words[1:], self.folder, output)
            assert status == 0, f"{command}\nstatus {status}\n{output.read_text()[-3000:]}"
        else:
            line = command if words[0] == "echo" else shlex.join(words)
            options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
            ended = subprocess.run(line, shell=True, cwd=self.folder, **options)
            assert ended.returncode == 0, f"{command}\n{ended.stdout[-500:]}{ended.stderr[-3000:]}"


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    folder = tmp_path_factory.mktemp("clone")
    for name in ("ponet", "kernels", "pretrain", "lra", "glue", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for write_some in (write_corpus, write_examples, write_lra):
        write_some(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{folder / 'kernels'}")
        patch.delenv("TRITON_INTERPRET", raising=False)
        # one that is there has another environment
        forkserver._forkserver._stop()
        yield Newcomer(folder, request.config.getoption("--run-slow"))
        forkserver._forkserver._stop()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_python_work_in_their_order(page: str, newcomer: Newcomer):
    if page != "README.md":
        # which has a test of its own
        with contextlib.suppress(AssertionError):
            newcomer.follow("README.md")
    newcomer.follow(page)


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if any(p in c for p in PARSERS)])
def test_commands_parse(command: str):
    words = shlex.split(command)
    program = next(word for word in words if word in PARSERS)
    arguments = words[words.index(program) + 1 :]
    goes_on = program == "pretrain/run.py" and {"--resume", "--checkpoint"}.intersection(arguments)
    if goes_on:
        # unknown flags end the process; all else is right but for the run, which is not here
        with pytest.raises(ValueError, match=r"--resume: .* holds no config\.yaml|no such folder"):
            PARSERS[program](arguments)
    elif "average" not in arguments:
        PARSERS[program](arguments)


def test_exceptions_name_commands_that_are_there():
    for pattern in (*ONLY_PARSED, *SLOW, *SMALLER):
        assert any(re.search(pattern, command) for command in ALL_COMMANDS), pattern


def test_readme_is_short_and_every_program_is_shown():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    shown = "\n".join(ALL_COMMANDS)
    for folder in ("pretrain", "lra", "glue", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            if "__main__" in path.read_text():
                assert str(path.relative_to(ROOT)) in shown
    for program in re.findall(r"[\w/]+\.py", shown):
        assert (ROOT / program).is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=str)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            # as GitHub makes them
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert anchor in anchors, link
