"""Label texts with a fine-tuned model: `python glue/predict.py --model DIR new.csv > labels.csv`.

FILE is a .csv, .tsv or .jsonl with the text columns of the training file. Each line of a .txt, or
of standard input where there is no FILE, is a text, or the two texts of a pair with a tab between
them. Standard output is CSV: per example its label and the probability of each class, or the number
that a regression predicts.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# threads that wait for work without a core of their own are ten times slower when they spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tokenizers import Tokenizer

from glue.data import DataError, TextExamples, read_table
from glue.encoding import ExampleEncoder
from glue.model import LabelSpec, load_classifier, outputs_of
from glue.tasks import ColumnKey, FileColumns
from ponet import PoNetForSequenceClassification
from ponet.run.cli import UsageError, errors_in_one_line
from ponet.run.log import set_up_logging
from ponet.run.runs import choose_device

# examples that are encoded, predicted and written together
_CHUNK = 4096


def table(
    model: PoNetForSequenceClassification,
    tokenizer: Tokenizer,
    spec: LabelSpec,
    examples: TextExamples,
) -> Iterator[list[str]]:
    """A header, then per example its label and probabilities, or the number of a regression."""
    encoder = ExampleEncoder(tokenizer, max_length=spec.max_length, segments=spec.segments)
    labels = spec.labels
    yield ["label", *(f"p({label})" for label in labels)] if labels else ["value"]
    for begin in range(0, len(examples), _CHUNK):
        chunk = examples.take(range(begin, min(begin + _CHUNK, len(examples))))
        outputs = torch.from_numpy(outputs_of(model, encoder.encode(chunk)))
        for values in (outputs.softmax(dim=1) if labels else outputs).numpy():
            figures = [f"{value:.4f}" for value in values]
            yield [labels[values.argmax()], *figures] if labels else figures


def read_lines(lines: Iterable[str], num_texts: int, origin: str) -> TextExamples:
    """Take each line as one text, or as the two of a pair with a tab between them."""
    rows = [line.rstrip("\r\n").split("\t") for line in lines]
    expected = "one text" if num_texts == 1 else "two texts with a tab between them"
    for number, row in enumerate(rows, start=1):
        if len(row) != num_texts or not all(text.strip() for text in row):
            found = len(row) if len(row) != num_texts else "an empty text"
            raise DataError(f"{origin}, line {number}: expected {expected}, found {found}")
    if not rows:
        raise DataError(f"{origin}: holds no lines")
    return TextExamples(
        texts=tuple(map(list, zip(*rows, strict=True))),
        labels=None,
        indices=[str(number) for number in range(len(rows))],
        columns=tuple(range(num_texts)),
        origin=origin,
    )


def read_input(file: str, columns: Sequence[ColumnKey]) -> TextExamples:
    """Examples of a file, or of standard input for "-"."""
    is_stdin = file == "-"
    if not is_stdin and Path(file).suffix.lower() != ".txt":
        return read_table(Path(file), FileColumns(texts=tuple(columns), from_flags=True), ())
    origin = "standard input" if is_stdin else file
    raw = sys.stdin.buffer if is_stdin else Path(file).open("rb")  # noqa: SIM115
    try:
        # texts may hold characters other than "\n" that Python would break lines at
        with io.TextIOWrapper(raw, "utf-8-sig", newline="\n") as lines:
            return read_lines(lines, len(columns), origin)
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: expected UTF-8 ({error})") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description="label texts with a fine-tuned model", allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder of a glue run")
    parser.add_argument("file", nargs="?", default="-", help="to label [lines of stdin]")
    parser.add_argument(
        "--text-column", nargs="+", help="column of the text, or of the two [as in training]"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    arguments = parser.parse_args(argv)
    set_up_logging(0)
    with errors_in_one_line("glue/predict.py"):
        device = choose_device(arguments.device)
        model, tokenizer, spec = load_classifier(arguments.model, device)
        trained_on = spec.text_columns
        columns = arguments.text_column or trained_on
        if len(columns) != len(trained_on):
            raise UsageError(f"--text-column: expected {len(trained_on)}, found {len(columns)}")
        examples = read_input(arguments.file, columns)
        rows = table(model, tokenizer, spec, examples)
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
