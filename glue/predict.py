"""Label lines with a fine-tuned model: `python glue/predict.py --model DIR [FILE]`.

A line holds a text, or the two texts of a pair with a tab between them; without FILE, or for "-",
lines come from standard input. For each line there is one on standard output: the label and the
probability of each class, or the number that a regression predicts.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from glue.encoding import RowEncoder
from glue.inference import outputs_of
from glue.model_folder import Meaning, read_meaning
from glue.rows import DataError, Rows
from ponet import CheckpointError, PoNetForSequenceClassification
from ponet.run.log import set_up_logging
from ponet.run.runs import choose_device, complain
from ponet.tokenizer import load_tokenizer

# lines that are encoded, predicted and written together
_CHUNK = 4096

Prediction = dict[str, Any]
"""{"label", "probabilities": {label: share}}, or {"value"} of a regression."""


class Predictor:
    """A fine-tuned model with all that its input and output mean."""

    def __init__(
        self, model: PoNetForSequenceClassification, tokenizer: Tokenizer, meaning: Meaning
    ) -> None:
        self.meaning = meaning
        self._model = model
        self._encoder = RowEncoder(
            tokenizer, max_length=meaning.max_length, segments=meaning.segments
        )

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device) -> "Predictor":
        """Load the model folder of a run.

        Raises:
            CheckpointError: a file is missing or damaged, or they contradict each other.
            ConfigError: `config.json` is missing or describes another architecture.
            ValueError: the tokenizer is missing or damaged.
        """
        meaning = read_meaning(folder)
        model = PoNetForSequenceClassification.from_pretrained(folder).to(device)
        if model.config.num_labels != (len(meaning.labels) or 1):
            raise CheckpointError(
                f"{folder}: the model has {model.config.num_labels} outputs, expected "
                f"{len(meaning.labels) or 1} for the labels {list(meaning.labels)}"
            )
        return cls(model, load_tokenizer(folder), meaning)

    def predict(self, texts: tuple[list[str], ...]) -> list[Prediction]:
        """Predict N examples.

        Args:
            texts: one list of N texts, or two for pairs; N is at least 1.
        """
        indices = [str(number) for number in range(len(texts[0]))]
        rows = Rows(texts=texts, labels=None, indices=indices, origin="input")
        outputs = torch.from_numpy(outputs_of(self._model, self._encoder.encode(rows)))
        labels = self.meaning.labels
        if not labels:
            return [{"value": value} for value in outputs.squeeze(1).tolist()]
        return [
            {"label": labels[best], "probabilities": dict(zip(labels, shares, strict=True))}
            for best, shares in zip(
                outputs.argmax(dim=1).tolist(), outputs.softmax(dim=1).tolist(), strict=True
            )
        ]


def read_texts(lines: Iterable[str], num_texts: int, origin: str) -> tuple[list[str], ...]:
    """Split lines into texts.

    Args:
        lines: with or without their ends.
        num_texts: 1, or 2 for pairs.
        origin: what to name in errors.

    Returns:
        One list a column.

    Raises:
        DataError: a line has another number of texts, or an empty one.
    """
    columns: tuple[list[str], ...] = tuple([] for _ in range(num_texts))
    expected = "one text" if num_texts == 1 else "two texts with a tab between them"
    for number, line in enumerate(lines, start=1):
        texts = line.rstrip("\r\n").split("\t")
        if len(texts) != num_texts:
            raise DataError(f"{origin}, line {number}: expected {expected}, found {len(texts)}")
        if not all(text.strip() for text in texts):
            raise DataError(f"{origin}, line {number}: expected {expected}, found an empty text")
        for column, text in zip(columns, texts, strict=True):
            column.append(text)
    return columns


def _read_input(name: str, num_texts: int) -> tuple[list[str], ...]:
    """Texts of a file, or of standard input for "-".

    Raises:
        DataError: the input is a folder, not UTF-8 or has no lines, or as for `read_texts`.
        OSError: the file cannot be read.
    """
    if name != "-" and Path(name).is_dir():
        raise DataError(f"{name}: is a folder, expected a file with a text on each line")
    origin = "standard input" if name == "-" else name
    raw = sys.stdin.buffer if name == "-" else Path(name).open("rb")  # noqa: SIM115
    try:
        # texts may hold characters other than "\n" that Python would break lines at
        with io.TextIOWrapper(raw, "utf-8-sig", newline="\n") as lines:
            texts = read_texts(lines, num_texts, origin)
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: expected UTF-8 ({error})") from error
    if not texts[0]:
        raise DataError(f"{origin}: holds no lines")
    return texts


def _format(prediction: Prediction, output_format: str) -> str:
    if output_format == "jsonl":
        return json.dumps(prediction, ensure_ascii=False)
    if "value" in prediction:
        return f"{prediction['value']:.4f}"
    shares = [f"{share:.4f}" for share in prediction["probabilities"].values()]
    return "\t".join([prediction["label"], *shares])


def _header(meaning: Meaning) -> str:
    columns = [f"p({label})" for label in meaning.labels]
    return "\t".join(["label", *columns]) if columns else "value"


def output_lines(
    predictor: Predictor, texts: tuple[list[str], ...], output_format: str
) -> Iterator[str]:
    """Lines of output: for TSV a header first, then one for each example.

    Args:
        predictor: the model.
        texts: as for `Predictor.predict`.
        output_format: "tsv" or "jsonl".
    """
    if output_format == "tsv":
        yield _header(predictor.meaning)
    for begin in range(0, len(texts[0]), _CHUNK):
        chunk = tuple(column[begin : begin + _CHUNK] for column in texts)
        for prediction in predictor.predict(chunk):
            yield _format(prediction, output_format)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="label lines with a fine-tuned model", allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder of a glue run")
    parser.add_argument("file", nargs="?", default="-", help="lines to label [standard input]")
    parser.add_argument("--format", choices=("tsv", "jsonl"), default="tsv", help="[tsv]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[auto]")
    return parser.parse_args()


def main() -> None:
    """Run the program."""
    set_up_logging(0)
    arguments = _parse()
    try:
        predictor = Predictor.from_folder(arguments.model, choose_device(arguments.device))
        texts = _read_input(arguments.file, predictor.meaning.num_texts)
        for line in output_lines(predictor, texts, arguments.format):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has had enough; Python would complain when it closes the stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(complain("glue/predict.py", error))


if __name__ == "__main__":
    main()
