"""The corpus of the example models: which files, which records, written out as which text.

Knows nothing about tokens, models or training.  Only permissive or share-alike sources are used,
and of Dolly only clients 4..8: the others are the private and the test data of the demo's devices.
Dolly's category is never read.
"""

import hashlib
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PUBLIC_CLIENTS = frozenset({4, 5, 6, 7, 8})
HELD_BACK_PERCENT = 1
PASSAGE_CHARS = 2000  # books and articles are cut at a paragraph end after this many characters
REQUEST_CHARS = 400  # the demo's devices keep requests of at most this many characters
VERBALISERS = (
    " brainstorming",
    " classification",
    " closed",
    " creative",
    " general",
    " information",
    " open",
    " summarization",
)

Row = Mapping[str, object]
Texts = tuple[list[str], list[str]]  # (training, held back)
Document = tuple[str, str]  # (key that decides whether it is held back, text)


class CorpusError(ValueError):
    """A corpus file is missing or is not the one the recipe was written for."""


@dataclass(frozen=True, slots=True)
class File:
    """One corpus file: where, which exact bytes, whence and under what licence."""

    path: str
    sha256: str
    source: str
    licence: str


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of text made from one file; `weight` is its share of the training windows."""

    name: str
    path: str
    weight: float
    write: Callable[[list[Row]], Iterator[Document]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files, the streams made from them, and files used for evaluation only."""

    files: tuple[File, ...]
    streams: tuple[Stream, ...]
    evaluation: tuple[Stream, ...] = ()

    def texts(self, folder: Path) -> dict[str, Texts]:
        """Stream name -> (training texts, held-back texts).  Raises: CorpusError."""
        rows = {file.path: read_rows(folder, file) for file in self.files}
        texts: dict[str, Texts] = {}
        for stream in self.streams:
            train: list[str] = []
            held: list[str] = []
            for key, text in stream.write(rows[stream.path]):
                (held if is_held_back(key) else train).append(text)
            texts[stream.name] = train, held
        for stream in self.evaluation:
            texts[stream.name] = [], [text for _, text in stream.write(rows[stream.path])]
        return texts


def is_held_back(key: str) -> bool:
    """Whether a document belongs to the slice that is never trained on."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < HELD_BACK_PERCENT


def read_rows(folder: Path, file: File) -> list[Row]:
    """Rows of a .jsonl.xz, or one row {"text": ...} for plain text.  Raises: CorpusError."""
    path = folder / file.path
    if not path.is_file():
        raise CorpusError(
            f"corpus file {path} is missing (expected sha256 {file.sha256}); "
            f"put {file.source} there, or name its folder with --data"
        )
    packed = path.read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != file.sha256:
        raise CorpusError(
            f"corpus file {path} is not the expected one: sha256 {found}, expected {file.sha256}; "
            f"restore it from {file.source}"
        )
    text = lzma.decompress(packed).decode()
    if ".jsonl" in file.path:
        return [json.loads(line) for line in text.split("\n") if line]
    return [{"text": text}]


def passages(rows: list[Row]) -> Iterator[Document]:
    """Prose in passages that end at a line or paragraph end."""
    for row in rows:
        passage: list[str] = []
        length = 0
        for line in str(row["text"]).splitlines(keepends=True):
            passage.append(line)
            length += len(line)
            if length >= PASSAGE_CHARS and not line.strip():
                yield _keyed("".join(passage).strip() + "\n")
                passage, length = [], 0
        if passage:
            yield _keyed("".join(passage).strip() + "\n")


def _keyed(text: str) -> Document:
    return text, text


def stories(rows: list[Row]) -> Iterator[Document]:
    """One document per row."""
    for row in rows:
        yield _keyed(str(row["text"]).strip() + "\n")


def public_dolly(rows: list[Row]) -> list[Row]:
    """Dolly records of the public clients whose instruction occurs in no private or test client."""
    private = {_folded(row) for row in rows if row["client10"] not in PUBLIC_CLIENTS}
    public = [row for row in rows if row["client10"] in PUBLIC_CLIENTS]
    return [row for row in public if _folded(row) not in private]


def _folded(row: Row) -> str:
    return " ".join(str(row["instruction"]).lower().split())


def dolly_short(rows: list[Row]) -> Iterator[Document]:
    """The bare request, as devices see it."""
    for row in public_dolly(rows):
        yield _folded(row), f"Request: {str(row['instruction']).strip()}\n"


def dolly_full(rows: list[Row]) -> Iterator[Document]:
    """The request with its context and its answer."""
    for row in public_dolly(rows):
        request, context, answer = (
            str(row[column]).strip() for column in ("instruction", "context", "response")
        )
        middle = f"Context: {context}\n" if context else ""
        yield _folded(row), f"Request: {request}\n{middle}Answer: {answer}\n"


def sni_full(rows: list[Row]) -> Iterator[Document]:
    """Super-NaturalInstructions: task, input, answer."""
    for row in rows:
        task, given, answer = (
            str(row[column]).strip() for column in ("instruction", "input", "output")
        )
        yield (
            f"{row['task']} {given}",
            f"Request: {_first_sentence(task)}\nInput: {given}\nAnswer: {answer}\n",
        )


def sni_kind(rows: list[Row]) -> Iterator[Document]:
    """Both orders of the product's format, with the public S-NI task categories as kinds."""
    for row in rows:
        task = _first_sentence(str(row["instruction"]).strip())
        given = " ".join(str(row["input"]).split())
        kind = str(row["category"]).lower().strip(".")
        key = f"{row['task']} {given}"
        requests = (given, task, f"{task} {given}")
        request = requests[len(given) % len(requests)][:REQUEST_CHARS].strip()
        yield key, f"Request: {request}\nKind: {kind}\n"
        yield key, f"Kind: {kind}\nRequest: {request}\n"


def _first_sentence(text: str) -> str:
    end = text.find(". ", 40)
    return text if end < 0 else text[: end + 1]


def choices(rows: list[Row]) -> Iterator[Document]:
    """Multiple-choice questions with the right choice spelt out."""
    for row in rows:
        question, options = str(row["question"]).strip(), row["choices"]
        assert isinstance(options, list)
        answer = options[int(str(row["label"]))]
        yield question, f"Request: {question}\nChoices: {'; '.join(options)}\nAnswer: {answer}\n"


def yes_no(rows: list[Row]) -> Iterator[Document]:
    """Questions answered by yes or no."""
    for row in rows:
        question = str(row["question"]).strip()
        yield question, f"Request: {question}\nAnswer: {'yes' if row['label'] else 'no'}\n"


def sums(rows: list[Row]) -> Iterator[Document]:
    """Worded arithmetic with the reasoning."""
    for row in rows:
        question = str(row["question"]).strip()
        yield question, f"Request: {question}\nAnswer: {str(row['answer']).strip()}\n"


def written_kinds(
    kind: str, question: Callable[[list[Row]], Iterator[Document]]
) -> Callable[[list[Row]], Iterator[Document]]:
    """The requests of a whole corpus under one kind, in both orders."""

    def write(rows: list[Row]) -> Iterator[Document]:
        for key, text in question(rows):
            request = text.split("\n")[0]
            yield key, f"{request}\nKind: {kind}\n"
            yield key, f"Kind: {kind}\n{request}\n"

    return write


DOLLY = "instruct/dolly15k.jsonl.xz"
_SNI = "instruct/sni.train.jsonl.xz"
_CQA = "qa/cqa.train.jsonl.xz"
_BOOLQ = "qa/boolq_nopassage.train.jsonl.xz"
_ARC_EASY = "qa/arc_easy.train.jsonl.xz"
_ARC_CHALLENGE = "qa/arc_challenge.train.jsonl.xz"
_OPENBOOK = "qa/openbookqa.train.jsonl.xz"
_GSM8K = "qa/gsm8k.train.jsonl.xz"
_GUTENBERG = "lm/gutenberg_by_author.jsonl.xz"
_SHAKESPEARE = "lm/tinyshakespeare.txt.xz"
_STORIES = "lm/tinystories.part_a.jsonl.xz"
_WIKITEXT = "lm/wikitext2.train.txt.xz"
_WIKITEXT_VALID = "lm/wikitext2.valid.txt.xz"

PUBLIC = Corpus(
    files=(
        File(
            DOLLY,
            "117f6fce15fca3c40ab0c6639eef323143e7db0c54fc442bbbd43417584539ba",
            "Dolly-15k, clients 4..8 only",
            "CC BY-SA 3.0",
        ),
        File(
            _SNI,
            "32c5b490c840da938a12fa46343f9901ba331a0424a99422aa92a12efa4b5710",
            "Super-NaturalInstructions, 184 English tasks",
            "Apache-2.0",
        ),
        File(
            _CQA,
            "56c9e53b2400dca626795e223adb8e699d7d245eafb6609557d01496c19a80dc",
            "CommonsenseQA 1.11",
            "MIT",
        ),
        File(
            _BOOLQ,
            "1f6a19f9b317a1b1b4cfc7dd06ab7764ba66e9ba315e9cbf7c84881c5d463b69",
            "BoolQ without passages",
            "CC BY-SA 3.0",
        ),
        File(
            _ARC_EASY,
            "e0a7aced0c5b6f2ad524036fa2accdd0c98a661cd8875bccc36ae5e52431e022",
            "ARC-Easy",
            "CC BY-SA 4.0",
        ),
        File(
            _ARC_CHALLENGE,
            "0461474a9a774a56e02021b24722856d68cf4f51d0e90e53305c70d92a3bff8b",
            "ARC-Challenge",
            "CC BY-SA 4.0",
        ),
        File(
            _OPENBOOK,
            "3591a52632fd1583916593fbbcfb035240fc9f2a8e88954c4f941576a0ddfe2a",
            "OpenBookQA",
            "Apache-2.0",
        ),
        File(
            _GSM8K,
            "96ba453363babbaa4dc232dfbc84a593fbcdc78e4a41397546d3e4e33038c9ad",
            "GSM8K",
            "MIT",
        ),
        File(
            _GUTENBERG,
            "673e932325e5ad720311a32448818e3859ab200ead12d50c1f1d478a1e6804d2",
            "20 Project Gutenberg books",
            "public domain in the USA",
        ),
        File(
            _SHAKESPEARE,
            "21b40ccf4999c004256d116655824719001352dbc22636354d9cd0c645d03a4a",
            "tinyshakespeare",
            "public domain",
        ),
        File(
            _STORIES,
            "cda5668d19fffebd2e0caf5608ce315f88bdbc126fc1f873d4f6835266840d8d",
            "TinyStories, 800 stories",
            "CDLA-Sharing-1.0",
        ),
        File(
            _WIKITEXT,
            "7f5b03a0219b81adcc680f2d8bd24b7b3f19e4a01ac52f9533ca18cc807ac2bd",
            "WikiText-2, training",
            "CC BY-SA 3.0",
        ),
        File(
            _WIKITEXT_VALID,
            "1322771e23310248961e17b3c55df138cd3e5c57f2e36ac1d131e9c6158ccd74",
            "WikiText-2, validation (measured on only)",
            "CC BY-SA 3.0",
        ),
    ),
    streams=(
        Stream("dolly-short", DOLLY, 0.14, dolly_short),
        Stream("dolly-full", DOLLY, 0.18, dolly_full),
        Stream("sni-full", _SNI, 0.08, sni_full),
        Stream("sni-kind", _SNI, 0.13, sni_kind),
        Stream("cqa", _CQA, 0.04, choices),
        Stream("boolq", _BOOLQ, 0.02, yes_no),
        Stream("boolq-kind", _BOOLQ, 0.01, written_kinds("yes or no", yes_no)),
        Stream("arc-easy", _ARC_EASY, 0.02, choices),
        Stream("arc-challenge", _ARC_CHALLENGE, 0.01, choices),
        Stream("openbookqa", _OPENBOOK, 0.02, choices),
        Stream("gsm8k", _GSM8K, 0.03, sums),
        Stream("gsm8k-kind", _GSM8K, 0.01, written_kinds("arithmetic", sums)),
        Stream("wikitext2", _WIKITEXT, 0.15, passages),
        Stream("gutenberg", _GUTENBERG, 0.12, passages),
        Stream("tinystories", _STORIES, 0.03, stories),
        Stream("tinyshakespeare", _SHAKESPEARE, 0.01, passages),
    ),
    evaluation=(Stream("wikitext2-valid", _WIKITEXT_VALID, 0.0, passages),),
)
