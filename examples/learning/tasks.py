"""The benchmark's tasks: which files, how a row becomes a text and its answer, how it is asked.

Knows rows of the corpora and `TextTask`. Does not know devices, models or how rows are dealt out.

Pair and multiple-choice tasks are asked as one text with one word as answer, since the product's
programs are defined for labelled texts. Texts are at most `CHARS` characters: the product's
requests are short, and a step's cost grows with them. What has to be whole (a question with its
choices) is left out when longer; what may lose its end (a news article, a premise) is cut.

Label words are chosen to be one token in both example tokenizers. The prompts follow the format
that the example models were pretrained on ("Request: ...", "Kind: ...").
"""

import hashlib
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from edge_sdk.wire.messages import TextTask
from examples.data.corpus import CorpusError, File, Row, read_rows

CHARS = 240
"""Most characters of a text: about 60 tokens."""

NEWS_CHARS = 160
"""Most characters of a news article: its title and a line."""

CHOICE_CHARS = 320
"""Most characters of a question with all its choices; longer ones are left out."""

Example = tuple[str, str]
"""A text and its label (or, in an open task, its answer)."""

PROMPT, WRITE = "Request: {text}\nKind:", "Kind: {label}\nRequest:"


@dataclass(frozen=True, slots=True)
class BenchTask:
    """One task: its files, its labels, and what it may cost.

    Attributes:
        labels: label -> the word a model answers with; empty for an open task.
        read: a row's text and label, or None for a row that is left out.
        steps: optimizer steps of a device in one round; fewer where texts are longer.
        group: the column by which an open task is skewed over the devices; "" for its label.
        test_share: above 0 when train and test rows come from one file: this share of it, by the
            hash of the text, is test.
    """

    name: str
    train: File
    test: File
    labels: dict[str, str]
    read: Callable[[Row], Example | None]
    steps: int
    group: str = ""
    test_share: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the answer is free text, measured by Rouge-L."""
        return not self.labels

    def text_task(self, answers: tuple[str, ...] = ()) -> TextTask:
        """How models are asked; an open task's labels are the `answers` there are."""
        if self.is_open:
            words = tuple(f" {answer}\n" for answer in answers)
            return TextTask(self.name, OPEN_PROMPT, "Answer: {label}\nRequest:", answers, words)
        return TextTask(
            self.name,
            PROMPT,
            WRITE,
            tuple(self.labels),
            tuple(f" {w}" for w in self.labels.values()),
        )


OPEN_PROMPT = "Request: {text}\nAnswer:"


def field(row: Row, column: str) -> str:
    """The text in `column`, on one line.  Raises: CorpusError."""
    if column not in row:
        raise CorpusError(f"a row lacks the column {column!r}; it has {', '.join(sorted(row))}")
    return " ".join(str(row[column]).split())


def shortened(text: str, limit: int = CHARS) -> str:
    """The text up to a word's end within `limit` characters."""
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0]


def plain(row: Row) -> Example:
    """A text with its label."""
    return shortened(field(row, "text")), field(row, "label")


def news(row: Row) -> Example:
    """An article's title and first words."""
    text, label = plain(row)
    return shortened(text, NEWS_CHARS), label


def sentence(row: Row) -> Example | None:
    """SST-2 trains on phrases and tests on sentences: phrases of a few words are left out."""
    text, label = plain(row)
    return (text, label) if len(text.split()) >= 8 else None


def entailment(row: Row) -> Example:
    """The hypothesis first, so that a cut takes the premise's end."""
    claim = f"{field(row, 'sentence2')} Given: {field(row, 'sentence1')}"
    return shortened(claim), field(row, "label")


def word_in_context(row: Row) -> Example | None:
    """One word in two sentences."""
    text = f"{field(row, 'word')}: {field(row, 'sentence1')} / {field(row, 'sentence2')}"
    return (text, field(row, "label")) if len(text) <= CHARS else None


def choice(letters: str) -> Callable[[Row], Example | None]:
    """A question with as many lettered choices as `letters`; the label is the right letter."""

    def read(row: Row) -> Example | None:
        options = row.get("choices")
        if not isinstance(options, list):
            raise CorpusError("a row lacks the list 'choices'")
        label = int(field(row, "label"))
        lettered = " ".join(f"{a}: {b}" for a, b in zip(letters, map(str, options), strict=False))
        text = f"{field(row, 'question')} {lettered}"
        if len(options) != len(letters) or len(text) > CHOICE_CHARS:
            return None
        return text, letters[label]

    return read


SNI_TASKS = frozenset(
    "32 38 39 50 87 335 449 482 541 552 570 611 614 692 693 1098 1304 1306".split()  # noqa: SIM905
)
"""Tasks with short inputs and short answers that are not one of a few labels."""


def short_answer(row: Row) -> Example | None:
    """An S-NI instance in the pretraining's format: the task's first sentence, the input."""
    if field(row, "task").removeprefix("task") not in SNI_TASKS:
        return None
    rule, answer = field(row, "instruction"), field(row, "output")
    end = rule.find(". ", 40)
    text = f"{shortened(rule if end < 0 else rule[: end + 1])}\nInput: {field(row, 'input')}"
    return (text, answer) if len(text) <= CHOICE_CHARS and 0 < len(answer) <= 60 else None


def _file(path: str, sha256: str, source: str, licence: str) -> File:
    return File(f"{path}.jsonl.xz", sha256, source, licence)


def _tasks() -> dict[str, BenchTask]:
    sni = _file(
        "instruct/sni.test",
        "67bcf62e0843c943c9ac22d64d05ec54e0b442d43cb9f40f0eeef4291b2ddc13",
        "Super-NaturalInstructions, instances not in sni.train",
        "Apache-2.0",
    )
    tasks = (
        BenchTask(
            "sst2",
            _file(
                "classification/sst2.train",
                "4e121e5a157de95836ec1a743d50c30e4dfdc2abaa5900fc895085fdfe95f4c2",
                "SST-2, GLUE train",
                "not stated",
            ),
            _file(
                "classification/sst2.dev",
                "0fded1044653ef4726cadf73c7dea837e70bbb9d77f4adb66044f46edcb28717",
                "SST-2, GLUE dev",
                "not stated",
            ),
            {"0": "negative", "1": "positive"},
            sentence,
            steps=44,
        ),
        BenchTask(
            "agnews",
            _file(
                "classification/agnews.train_part",
                "18550e1945834640bb692504ddfba15e64d175c2490ce4911fbe6d845ed2136c",
                "AG News, part of train",
                "non-commercial",
            ),
            _file(
                "classification/agnews.test_a",
                "d89fbd0b5171cd759d86a33905cf52cb836e99bf05cad4efc803dcbd1bd2bc10",
                "AG News, half of test",
                "non-commercial",
            ),
            {"0": "world", "1": "sports", "2": "business", "3": "science"},
            news,
            steps=36,
        ),
        BenchTask(
            "trec",
            _file(
                "classification/trec.train",
                "29a56bbe5cc74383a0c9ce419b95f9fd9d2b8b689f19bcaaaaadac2ce1763afd",
                "TREC, train",
                "not stated",
            ),
            _file(
                "classification/trec.test",
                "89cd8cbb650ccb4c08468045c4c798bbe3c2c576513f21edd2715e324c15a59a",
                "TREC, test",
                "not stated",
            ),
            {
                "ABBR": "letters",
                "DESC": "meaning",
                "ENTY": "thing",
                "HUM": "person",
                "LOC": "place",
                "NUM": "number",
            },
            plain,
            steps=40,
        ),
        BenchTask(
            "rte",
            _file(
                "qa/rte.train",
                "bcb0306d3d6a495367a6be20e18c75043f6a8c189f5dfc486264a99bafad1108",
                "RTE, GLUE train",
                "not stated",
            ),
            _file(
                "qa/rte.dev",
                "21242f0584e13dda6820a9312b1be7618170ac7edf86651bc68057cdaf206d0d",
                "RTE, GLUE dev",
                "not stated",
            ),
            {"entailment": "yes", "not_entailment": "no"},
            entailment,
            steps=12,
        ),
        BenchTask(
            "wic",
            _file(
                "qa/wic.train",
                "e874202347b1da42e3bc34f673df6973809c29892118aaa6c86004978f08f0e2",
                "WiC 1.0, train",
                "CC BY-NC 4.0",
            ),
            _file(
                "qa/wic.dev",
                "fb5f561ec5083ed6e9e0387691ce8a356b7fcab3933945bc4c06137f06c739d9",
                "WiC 1.0, dev",
                "CC BY-NC 4.0",
            ),
            {"False": "different", "True": "same"},
            word_in_context,
            steps=20,
        ),
        BenchTask(
            "cqa",
            _file(
                "qa/cqa.train",
                "56c9e53b2400dca626795e223adb8e699d7d245eafb6609557d01496c19a80dc",
                "CommonsenseQA 1.11, train",
                "MIT",
            ),
            _file(
                "qa/cqa.dev",
                "05ca7851ad43e810ad0e4b8a95c11ea206478eb297e71035b0075c625542c674",
                "CommonsenseQA 1.11, dev",
                "MIT",
            ),
            {letter: letter for letter in "ABCDE"},
            choice("ABCDE"),
            steps=16,
        ),
        BenchTask(
            "arc-e",
            _file(
                "qa/arc_easy.train",
                "e0a7aced0c5b6f2ad524036fa2accdd0c98a661cd8875bccc36ae5e52431e022",
                "ARC-Easy, train",
                "CC BY-SA 4.0",
            ),
            _file(
                "qa/arc_easy.test_a",
                "bb7bcf6b19de4f6391fef91dda4fcabf4b89a7cd3179250975312711efc4bfe7",
                "ARC-Easy, half of test",
                "CC BY-SA 4.0",
            ),
            {letter: letter for letter in "ABCD"},
            choice("ABCD"),
            steps=14,
        ),
        BenchTask("sni", sni, sni, {}, short_answer, steps=32, group="task", test_share=0.35),
    )
    return {task.name: task for task in tasks}


TASKS = _tasks()


def verify(folder: Path, names: Sequence[str], *, verified: bool = True) -> None:
    """Look at every file of the named tasks; unless `verified`, only whether they are there.

    Raises:
        CorpusError: names all files that are missing or altered.
    """
    wrong = []
    for file in files_of(names).values():
        try:
            rows_of(folder, file, verified)
        except CorpusError as exc:
            wrong.append(str(exc))
    if wrong:
        raise CorpusError("\n".join(wrong))


@cache
def rows_of(folder: Path, file: File, verified: bool = True) -> list[Row]:
    """The rows of one file, read once in a process; unless `verified`, whatever its checksum.

    Raises:
        CorpusError: missing, altered, or not rows of JSON.
    """
    if not verified:
        file = replace(file, sha256=sha256_of(folder, file))
    try:
        return read_rows(folder, file)
    except (lzma.LZMAError, EOFError, ValueError) as exc:
        if isinstance(exc, CorpusError):
            raise
        raise CorpusError(f"corpus file {folder / file.path} is not xz of JSON lines") from exc


def sha256_of(folder: Path, file: File) -> str:
    """The sum of the file as it is; of nothing if it is missing."""
    path = folder / file.path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else file.sha256


def files_of(names: Iterable[str]) -> dict[str, File]:
    """The files of the named tasks, by path."""
    return {f.path: f for name in names for f in (TASKS[name].train, TASKS[name].test)}
