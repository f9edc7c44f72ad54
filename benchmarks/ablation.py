"""The ablation table of PoNet's poster and its curves: what each part does for text and for tasks.

    python benchmarks/ablation.py --data-dir data --config small --data wikitext --steps 4000
    python benchmarks/ablation.py --variants ponet no-ga bert --config small --data wikitext

pretrain/run.py, which gets all flags that --help does not list, pre-trains each of `VARIANTS` on as
many tokens under one recipe; glue/run.py fine-tunes it on CoLA and STS-B. report.md, report.json
and report.png are written after every part. The same command skips what is finished and continues
what was interrupted; commands with other --variants may share the folder at the same time, and each
reports on all it finds. A part that fails does not stop the next; the exit status is 1 then.
"""

import argparse
import json
import shlex
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from benchmarks import ROOT
from benchmarks.common import NUMBER, RUNS, Row
from benchmarks.gpu_report import run_command
from ponet.files import write_json
from ponet.run.cli import UsageError, errors_in_one_line
from ponet.run.report import figure_text, markdown_table, scores_text, write_report

FULL = "ponet"
"""The variant that the others are compared with."""
_BERT = "--mixer attention --attention-probs-dropout-prob 0.1"
# name in print, what pretrain/run.py is told, colour and line of the curve
VARIANTS: dict[str, tuple[str, str, str, str]] = {
    FULL: ("PoNet", "", "#0072B2", "-"),
    "no-second-stage": ("no second stage", "--no-use-global-second-stage", "#E69F00", "--"),
    "no-ga": ("no GA", "--no-use-global", "#E69F00", "-"),
    "no-smp": ("no SMP", "--no-use-segment", "#CC79A7", "-"),
    "no-lmp": ("no LMP", "--no-use-local", "#56B4E9", "-"),
    "nsp": ("MLM + NSP", "--objective mlm+nsp", "#0072B2", "--"),
    "mlm": ("MLM alone", "--objective mlm", "#0072B2", ":"),
    "bert": ("BERT", _BERT, "#D55E00", "-"),
    "fnet": ("FNet", "--mixer fnet", "#009E73", "-"),
}
_FIGURES = {"mlm": "masked LM", "sso": "sentences", "cola": "CoLA", "stsb": "STS-B"}
_TASKS = ("cola", "stsb")
# of the published base model after 340,000 steps; the other rows of that table are not known
_PUBLISHED = {"cola": 45.36, "stsb": 84.57}
# what the poster states: variant, figure, how it compares with PoNet
_TRENDS = [
    *(("no-ga", figure, "lower") for figure in ("sso", "stsb")),
    *((name, figure, "lower") for name in ("no-smp", "no-lmp") for figure in ("mlm", "cola")),
    # a weaker sentence objective: worse for what GA does, better for SMP and LMP
    *((name, "stsb", "lower") for name in ("nsp", "mlm")),
    *((name, figure, "higher") for name in ("nsp", "mlm") for figure in ("mlm", "cola")),
]


@dataclass(frozen=True)
class Stage:
    """What a program does for a variant."""

    name: str
    """Of the program."""
    folder: Path
    """Of the variant."""
    flags: list[str]
    """What decides the figures."""
    places: list[str]
    """Flags that say where things are."""

    def record(self) -> Row:
        """Its flags and the JSON document that it printed last; empty until it is finished."""
        path = self.folder / f"{self.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def finished(self) -> Row:
        """The record, unless that is by other flags."""
        record = self.record()
        return record if record.get("flags") == self.flags else {}

    def perform(self) -> str:
        """Run it, unless that is done; returns what went wrong."""
        log = self.folder / f"{self.name}.log"
        if self.finished():
            return ""
        command = [sys.executable, str(ROOT / self.name / "run.py"), *self.flags, *self.places]
        if self.name == "pretrain" and (self.folder / self.name / "config.yaml").is_file():
            command += ["--resume", str(self.folder / self.name)]
        print(f"{self.folder.name}: {self.name}, log: {log}", flush=True)
        state = run_command(command, None, log, folder=Path.cwd())
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if state != "ok":
            reasons = [line for line in lines if "error:" in line] or lines
            return f"{state}: {reasons[-1] if reasons else 'printed nothing'}"
        document = json.loads(next(line for line in reversed(lines) if line.startswith('{"')))
        write_json(self.folder / f"{self.name}.json", {"flags": self.flags, **document})
        return ""


def parts_of(variant: str, options: argparse.Namespace) -> list[Stage]:
    """Pre-training and fine-tuning."""
    folder = options.output / variant
    pretrain = [*shlex.split(VARIANTS[variant][1]), *options.pretrain]
    tasks = ["--task", *_TASKS, "--no-save-models", *options.glue]
    model = [f"--checkpoint={folder / 'pretrain' / 'model'}", f"--data-dir={options.data_dir}"]
    parts = (("pretrain", pretrain, []), ("glue", tasks, model))
    return [
        Stage(name, folder, flags, [*places, f"--output-dir={folder / name}"])
        for name, flags, places in parts
    ]


def refuse_other_runs(options: argparse.Namespace) -> None:
    """Raise a `UsageError` where a variant was pre-trained by other flags, before a part runs."""
    for variant in options.variants:
        stage = parts_of(variant, options)[0]
        found = stage.record().get("flags")
        if found not in (None, stage.flags):
            raise UsageError(f"{stage.folder} is by {shlex.join(found)}; give another --output")


def perform(variant: str, options: argparse.Namespace) -> Iterator[str]:
    """Do the parts of a variant, one after the other; gives what went wrong with each."""
    options.output.joinpath(variant).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(options.output / variant / ".lock", blocking=False):
            for part in parts_of(variant, options):
                error = part.perform()
                yield error and f"{variant}: {part.name}: {error}"
                if error:
                    return
    except Timeout:
        yield f"{variant}: another command is at it in {options.output}"


def row_of(variant: str, options: argparse.Namespace) -> Row:
    """The figures of a variant, in per cent, as far as there are any."""
    pretrain, glue = (stage.finished() for stage in parts_of(variant, options))
    row: Row = {"variant": variant, "tokens": pretrain.get("tokens")}
    for key, value in pretrain.items():
        if key.endswith(("_accuracy", "_baseline")):
            row[key.removesuffix("_accuracy")] = 100 * value
    # scores rest on the pre-training of their time
    for task in _TASKS if pretrain else ():
        points: dict[tuple[int, float], list[float | None]] = {}
        for run in (run for run in glue.get("runs", []) if run["task"] == task):
            points.setdefault((run["batch_size"], run["learning_rate"]), []).append(run["score"])
        # undefined where a model gives one answer only
        defined = [
            [100 * x for x in scores if x is not None]
            for scores in points.values()
            if None not in scores
        ]
        if defined:
            row[f"{task}_scores"] = max(defined, key=statistics.mean)
            row[task] = statistics.mean(row[f"{task}_scores"])
    return row


def trends_of(rows: Sequence[Row]) -> list[Row]:
    """What the poster states, the figures here, and whether it holds for them."""
    found, trends = {row["variant"]: row for row in rows}, []
    for variant, figure, expected in _TRENDS:
        full, ours = (found.get(name, {}).get(figure) for name in (FULL, variant))
        facts = {"variant": variant, "figure": figure, "published": expected}
        if full is not None and ours is not None:
            facts |= {"ponet": full, "ours": ours}
            facts["holds"] = ours < full if expected == "lower" else ours > full
        trends.append(facts)
    return trends


def text_of(rows: Sequence[Row], trends: Sequence[Row], options: argparse.Namespace) -> str:
    """The report in Markdown."""

    def beside(row: Row, name: str, *baselines: str) -> str:
        said = [figure_text(row[key]) for key in baselines if key in row]
        return f"{figure_text(row[name])} ({', '.join(said)})" if name in row else ""

    head = ["variant", "million tokens", "masked LM (majority)"]
    head += ["sentences (majority, lengths alone)", *(_FIGURES[task] for task in _TASKS)]
    head += [f"published {_FIGURES[task]}" for task in _TASKS]
    table = [
        [
            VARIANTS[row["variant"]][0],
            figure_text(row["tokens"] and row["tokens"] / 1e6),
            beside(row, "mlm", "mlm_baseline"),
            beside(row, "sso", "sso_baseline", "sso_length_baseline"),
            *(scores_text(row[f"{task}_scores"]) if task in row else "" for task in _TASKS),
            *(figure_text(_PUBLISHED[t] if row["variant"] == FULL else None) for t in _TASKS),
        ]
        for row in rows
    ]
    words = {True: "holds", False: "does not hold", None: ""}
    stated = [
        [
            f"{VARIANTS[facts['variant']][0]}: {_FIGURES[facts['figure']]} {facts['published']}",
            *(figure_text(facts.get(name)) for name in ("ponet", "ours")),
            words[facts.get("holds")],
        ]
        for facts in trends
    ]
    return f"""# Ablation of PoNet

Pre-training: `{shlex.join(options.pretrain)}`, fine-tuning: `{shlex.join(options.glue)}`.

{markdown_table(head, table)}

Accuracies in per cent of held-out text: all tokens to predict, and sentence pairs, of three classes
or with NSP of two. CoLA: 100 x Matthews correlation, STS-B: 100 x Spearman's, on the development
sets, at the best of several recipes if there are, with the number of seeds; a model that gives one
answer only has neither. Published: the base model after 340,000 steps.

{markdown_table(["stated on the poster", "PoNet", "variant", "here"], stated)}
"""


def figure_of(output: Path) -> Figure:
    """Accuracies on held-out text over the steps of every variant."""
    figure = Figure(layout="constrained", figsize=(12, 4.5))
    panels = dict(zip(("mlm", "sso"), figure.subplots(1, 2), strict=True))
    for variant, (label, _, colour, line) in VARIANTS.items():
        path = output / variant / "pretrain" / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # a run that is at work may have written half of the last one
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        look = {
            "color": colour,
            "ls": line,
            "lw": 2.6 if variant == FULL else 1.4,
            "label": label if lines else "_",
        }
        for name, axes in panels.items():
            key = f"{name}_accuracy"
            found = [entry for entry in entries if entry["kind"] == "eval" and key in entry]
            axes.plot([e["step"] for e in found], [100 * e[key] for e in found], **look)
    for name, axes in panels.items():
        axes.set_title(f"{_FIGURES[name]}: held-out accuracy, per cent", loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    labels = panels["mlm"].get_legend_handles_labels()
    figure.legend(*labels, loc="outside right center", frameon=False)
    return figure


def report(options: argparse.Namespace) -> str:
    """Write the report on all variants of the folder; returns its Markdown."""
    rows = [row_of(name, options) for name in VARIANTS if (options.output / name).is_dir()]
    trends = trends_of(rows)
    text = text_of(rows, trends, options)
    write_report(options.output, text, figure_of(options.output))
    settings = {"pretrain": options.pretrain, "glue": options.glue}
    write_json(options.output / "report.json", {**settings, "rows": rows, "trends": trends})
    return text


def parse_options() -> argparse.Namespace:
    """The command line; what it does not know is for pretrain/run.py."""
    parser = argparse.ArgumentParser(description="PoNet's ablation table", allow_abbrev=False)
    add = parser.add_argument
    names: Row = {"choices": list(VARIANTS), "default": list(VARIANTS), "nargs": "+"}
    add("--variants", **names, metavar="NAME", help=", ".join(VARIANTS))
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="of GLUE [data]")
    add("--seeds", default=1, **NUMBER, help="of fine-tuning [1]")
    text = "what else glue/run.py is told: --glue='--epochs 3 --learning-rate 1e-4'"
    add("--glue", type=shlex.split, default=[], metavar="FLAGS", help=text)
    add("--output", type=Path, default=RUNS / "ablation", metavar="DIR", help="[%(default)s]")
    options, options.pretrain = parser.parse_known_args()
    options.glue = [f"--seeds={options.seeds}", *options.glue]
    return options


def main() -> None:
    """Pre-train, fine-tune, report."""
    options = parse_options()
    # the part that runs is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ablation: ended"))
    failures, text = [], ""
    with errors_in_one_line("ablation", advice="; the same command continues"):
        refuse_other_runs(options)
        for variant in dict.fromkeys(options.variants):
            for failure in perform(variant, options):
                text = report(options)
                if failure:
                    failures.append(failure)
                    print(f"ablation: error: {failure}", file=sys.stderr, flush=True)
    print(f"\n{text}\nwritten: {options.output}/report.md, report.json, report.png")
    if failures:
        sys.exit(f"ablation: {len(failures)} parts failed: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
