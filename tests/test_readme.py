"""README and docs as a newcomer uses them: commands and Python run in their order on tiny data."""

import contextlib
import csv
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import glue.settings
import lra.settings
import pretrain.settings
from ponet.run.cli import UsageError

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/pretraining.md",
    "docs/lra.md",
    "docs/glue.md",
    "docs/benchmarks.md",
    "docs/kernels.md",
    "docs/differences.md",
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
    "pretrain/run.py": "--steps 2 --eval-every 2 --eval-tokens 512 --warmup-steps 1 --seq-len 64 "
    "--batch-tokens 512 --micro-batch-tokens 256 --max-characters 200000 --vocab-size 600 "
    "--hidden-size 32 --num-hidden-layers 3 --num-attention-heads 2 --intermediate-size 64 "
    "--validation-fraction 0.1 --cache-dir cache",
    "lra/prepare.py": "--workers 1",
    "lra/run.py": "--batch-size 2 --eval-every 2 --eval-batches 1 --test-examples 4 --seeds 1",
    "benchmarks/speed_memory.py": "--seq-len 64 --batch-size 1 --rounds 1 --budget 1",
    "benchmarks/op_speed.py": "--batch-size 2 --seq-len 40 --width 24 --heads 3 --repeats 1",
    "benchmarks/input_pipeline.py": "--max-characters 200000 --repeats 1",
}
"""Flags that make any command of a program small."""
SMALLER_STILL = {
    r"pretrain/run.py (?!.*(--data|runs/demo))": "--data data/corpus",
    r"prepare.py --task listops pathfinder": "--num-examples 60",
    r"lra/run.py": "--steps 2",
    # of own tasks, whose data are small, the next command names the folder
    r"glue/run.py (?!.*--train-file)": "--epochs 1 --max-train-examples 16 --max-length 32",
    r"lra/run.py .*--pretrain-epochs": "--pretrain-epochs 0.1",
    r"speed_memory.py --model": "--layers 1",
}
"""Further flags for the commands that a pattern finds."""
AS_WRITTEN = r"--resume|--quick"
"""Commands that take no other flags."""
ONLY_PARSED = {
    r"^pip ": "installs packages",
    r"^pytest": "is what runs here",
    r"--data wikitext": "reads the hub over the network",
    r"--zero-stage 2": "needs GPUs",
    r"gpu_report.py": "needs a GPU; with --tiny it has a test of its own",
}
"""Commands that do not run here, by pattern, and why."""
SLOW = {
    r"--num_gpus 2|torchrun|--jobs 2": "several processes",
    r"lra/run.py --task all": "15 runs",
    r"glue/run.py --task all": "8 tasks",
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


COMMANDS = {
    page: [c for kind, block in blocks_of(page) if kind == "sh" for c in commands_in(block)]
    for page in PAGES
}
IN_TABLES = re.findall(r"`((?:python|deepspeed) [^`]+)`", (ROOT / "README.md").read_text())


def found_in(command: str, patterns: dict[str, str]) -> list[str]:
    """The values of the patterns that are in a command."""
    return [value for pattern, value in patterns.items() if re.search(pattern, command)]


def program_of(words: list[str]) -> str | None:
    """The program of ours that a command starts."""
    return next((word for word in words if word.endswith(".py")), None)


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
    with lzma.open(data / "more.jsonl.xz", "wt") as file:
        file.write("\n".join(records))
    words = sorted(set(re.findall("[a-z]{3,}", (ROOT / "README.md").read_text())))
    letters = [chr(i) for i in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    write(data / "vocab.txt", [*special, *letters, *(f"##{x}" for x in letters), *words])


def write_examples(data: Path) -> None:
    """Texts to classify: which page is a sentence from?"""
    pages = ("kernels", "lra_speed")
    rows = [(s, page) for page in pages for s in sentences_of(f"docs/{page}.md")[:30]]
    for name, columns in (("mine", ("text", "kind")), ("pairs", ("title", "body", "kind"))):
        with (data / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            table.writerows((*[text] * (len(columns) - 1), page) for text, page in rows)
    write(data / "new.txt", [text for text, _ in rows[:5]])
    write(data / "new_pairs.csv", ["title,body", *(f'"{text}","{text}"' for text, _ in rows[:5])])


def write_glue(data: Path) -> None:
    """The tasks in the layout of the official archive, 24 / 12 / 4 rows."""
    texts = sentences_of("docs/kernels.md")
    for split, n in (("train", 24), ("dev", 12), ("test", 4)):
        labelled = split != "test"
        one = [(i, texts[i % len(texts)]) for i in range(n)]
        write(
            data / "CoLA" / f"{split}.tsv",
            [f"gj04\t{i % 2}\t\t{text}" for i, text in one]
            if labelled
            else ["index\tsentence", *(f"{i}\t{text}" for i, text in one)],
        )
        write(
            data / "SST-2" / f"{split}.tsv",
            ["sentence\tlabel" if labelled else "index\tsentence"]
            + [f"{text}\t{i % 2}" if labelled else f"{i}\t{text}" for i, text in one],
        )
        entailment = ("not_entailment", "entailment")
        for task, columns, label, names in (
            ("MRPC", "#1 String\t#2 String", "Quality", ("0", "1")),
            ("STS-B", "sentence1\tsentence2", "score", ("0.500", "4.800")),
            ("QQP", "question1\tquestion2", "is_duplicate", ("0", "1")),
            ("QNLI", "question\tsentence", "label", entailment),
            ("RTE", "sentence1\tsentence2", "label", entailment),
        ):
            rows = [(f"{i}\t{text}\t{text}", names[i % 2]) for i, text in one]
            lines = [f"{row}\t{name}" if labelled else row for row, name in rows]
            header = f"index\t{columns}" + (f"\t{label}" if labelled else "")
            write(data / task / f"{split}.tsv", [header, *lines])
    classes = glue.settings.TASKS["mnli"].labels
    for split in ("train", "dev_matched", "dev_mismatched"):
        lines = [f"{text}\t{text}\tx\t{classes[i % 3]}" for i, text in enumerate(texts[:24])]
        header = "sentence1\tsentence2\tlabel1\tgold_label"
        write(data / "MNLI" / f"{split}.tsv", [header, *lines])
    for split in ("train", "dev"):
        rows = [
            {"text": text, "label": ("false", "true")[i % 2]} for i, text in enumerate(texts[:24])
        ]
        write(data / "hyperpartisan" / f"{split}.jsonl", [json.dumps(row) for row in rows])


def write_lra(data: Path) -> None:
    """Reviews, images and pairs of papers."""
    texts = sentences_of("docs/kernels.md")
    for split in ("train", "test"):
        for number, text in enumerate(texts[:40]):
            write(data / f"aclImdb/{split}/{('neg', 'pos')[number % 2]}/{number}_5.txt", [text])
        for name in lra.settings.TASKS["image"].class_names:
            for number in range(2):
                path = data / f"cifar10/{split}/{name}/{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(path)
    for split in ("train", "eval", "test"):
        rows = [f"{i % 2}\t{i}\t{i}\t{text}\t{text}" for i, text in enumerate(texts[:20])]
        write(data / f"aan/new_aan_pairs.{split}.tsv", rows)


class Newcomer:
    """Someone with a fresh clone and small data who follows the pages."""

    def __init__(self, folder: Path, *, patient: bool) -> None:
        self.folder = folder
        self._patient = patient
        self._done: set[str] = set()
        for name in ("ponet", "kernels", "pretrain", "lra", "glue", "benchmarks"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for write_some in (write_corpus, write_examples, write_glue, write_lra):
            (folder / "data").mkdir(exist_ok=True)
            write_some(folder / "data")
        absent = ("TRITON_INTERPRET", "PYTHONSTARTUP")
        self._environment = {k: v for k, v in os.environ.items() if k not in absent} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{folder}:{folder / 'kernels'}",
            "OMP_WAIT_POLICY": "passive",
            "HF_HUB_OFFLINE": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
        )

    def leave(self) -> None:
        """End the server."""
        self._server.communicate()

    def follow(self, page: str) -> None:
        """Do what a page says, in its order; what another page said word for word is done."""
        for number, (kind, block) in enumerate(blocks_of(page)):
            if kind == "python":
                self._python(f"{Path(page).stem}_{number}.py", block)
                continue
            for command in commands_in(block):
                skipped = found_in(command, ONLY_PARSED | ({} if self._patient else SLOW))
                if not skipped and command not in self._done:
                    self._done.add(command)
                    self._command(command)

    def _python(self, name: str, block: str) -> None:
        path = re.match(r"# (\S+\.py)\n", block)
        (self.folder / (path[1] if path else name)).write_text(block)
        if not path and block not in self._done:
            self._done.add(block)
            self._fork([name], block)

    def _command(self, command: str) -> None:
        words = shlex.split(command)
        if not re.search(AS_WRITTEN, command):
            flags = [SMALLER.get(program_of(words) or "", ""), *found_in(command, SMALLER_STILL)]
            words += shlex.split(" ".join(flags))
        # a launcher with one process starts what follows
        if words[0] == "python" or (words[0] == "deepspeed" and not self._patient):
            self._fork(words[1:], command)
        else:
            line = command if words[0] == "echo" else shlex.join(words)
            ended = subprocess.run(
                line,
                shell=True,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert ended.returncode == 0, f"{command}\n{ended.stdout[-500:]}{ended.stderr[-3000:]}"

    def _fork(self, words: list[str], command: str) -> None:
        output = self.folder / "output"
        output.write_text("")
        job = {"command": words, "folder": str(self.folder), "output": str(output)}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(job), file=self._server.stdin, flush=True)
        status = self._server.stdout.readline().strip()
        assert status == "0", f"{command}\nstatus {status}\n{output.read_text()[-3000:]}"


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    someone = Newcomer(
        tmp_path_factory.mktemp("clone"), patient=request.config.getoption("--run-slow")
    )
    yield someone
    someone.leave()


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_python_work_in_their_order(page: str, newcomer: Newcomer):
    if page != "README.md":
        # which has a test of its own
        with contextlib.suppress(AssertionError):
            newcomer.follow("README.md")
    newcomer.follow(page)


ALL_COMMANDS = list(dict.fromkeys([*(c for page in PAGES for c in COMMANDS[page]), *IN_TABLES]))


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if any(p in c for p in PARSERS)])
def test_commands_parse(command: str):
    words = shlex.split(command)
    program = next(word for word in words if word in PARSERS)
    arguments = words[words.index(program) + 1 :]
    if "--resume" in arguments:
        # unknown flags end the process; all else is right but for the run, which is not here
        with pytest.raises(UsageError, match=r"--resume: .* holds no config\.yaml"):
            PARSERS[program](arguments)
    elif "average" not in arguments:
        PARSERS[program](arguments)


@pytest.mark.parametrize(
    "table", [ONLY_PARSED, SLOW, SMALLER_STILL], ids=["only-parsed", "run-slow", "smaller"]
)
def test_exceptions_name_commands_that_are_there(table: dict[str, str]):
    for pattern in table:
        assert any(re.search(pattern, command) for command in ALL_COMMANDS), pattern


def test_every_program_is_shown():
    shown = "\n".join(ALL_COMMANDS)
    for program in (
        *PARSERS,
        "lra/prepare.py",
        "lra/report.py",
        "glue/report.py",
        "glue/predict.py",
    ):
        assert program in shown
    for program in re.findall(r"[\w/]+\.py", shown):
        assert (ROOT / program).is_file()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors_of(page: Path) -> set[str]:
    """What headings are called in links, as GitHub does it."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=str
)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
