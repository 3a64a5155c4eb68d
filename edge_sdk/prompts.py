"""A text task as tokens: prompts, label words, and cutting a text that is too long.

Knows tokenizers and `TextTask`. Does not know any model, and needs neither torch nor a runtime, so
that training (torch) and inference (ONNX Runtime) build the very same tokens from it.

A text becomes `Request: {text}\\nKind:` followed by the label's word. The frame around the text is
always kept; a text too long is cut at its end.
"""

from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.errors import ConfigError, DataError
from edge_sdk.wire.messages import TextTask

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = list[int]


def load_tokenizer(folder: Path | str) -> "Tokenizer":
    """Return the tokenizer of a bundle or model folder, padding and cutting switched off.

    Raises:
        ConfigError: tokenizer.json is missing or unreadable.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the tokenizers library raises bare Exception
        raise ConfigError(f"{path}: not a readable tokenizer ({exc})") from exc
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TaskPrompts:
    """Turns the texts of one task into tokens of one model.

    Attributes:
        words: the tokens of each label's word, as they come after the prompt.
        one_token_decides: whether the words' first tokens differ pairwise.

    Raises:
        ConfigError: labels and words do not pair up, a prompt lacks its place, a label's word has
            no tokens, or the prompt alone does not fit `max_tokens`.
    """

    def __init__(self, task: TextTask, tokenizer: "Tokenizer", *, max_tokens: int) -> None:
        if len(task.labels) != len(task.words) or len(set(task.labels)) != len(task.labels):
            raise ConfigError(
                f"task {task.name}: {len(task.labels)} labels need as many words, labels distinct"
            )
        if "{text}" not in task.prompt:
            raise ConfigError(f"task {task.name}: its prompt needs {{text}}")
        self.task, self.max_tokens = task, max_tokens
        self._tokenizer = tokenizer
        self._before, self._after = task.prompt.split("{text}", 1)
        self._index = {label: i for i, label in enumerate(task.labels)}
        self.words = [self._word(word) for word in task.words]
        firsts = [word[0] for word in self.words]
        self.one_token_decides = len(set(firsts)) == len(firsts)
        self._limit = max_tokens - max(map(len, self.words))
        if self._limit <= len(self._frame("")):
            raise ConfigError(f"task {task.name}: its prompt leaves no room in {max_tokens} tokens")

    def label_index(self, label: str) -> int:
        """Return the position of `label` in the task.

        Raises:
            DataError: not a label of this task.
        """
        if label not in self._index:
            raise DataError(
                f"label {label!r} is not of task {self.task.name}; "
                f"its labels are {', '.join(self.task.labels)}"
            )
        return self._index[label]

    def prompts(self, texts: Sequence[str]) -> list[Tokens]:
        """Return each text's prompt tokens, short enough that any label's word still fits."""
        rows = self._tokenizer.encode_batch([self._before + text + self._after for text in texts])
        return [
            list(row.ids) if len(row.ids) <= self._limit else self._cut(text)
            for text, row in zip(texts, rows, strict=True)
        ]

    def _frame(self, text: str) -> Tokens:
        return list(self._tokenizer.encode(self._before + text + self._after).ids)

    def _word(self, word: str) -> Tokens:
        # In place, because a tokenizer may treat a word at the start of a text differently.
        frame = list(self._tokenizer.encode(self.task.prompt).ids)
        whole = list(self._tokenizer.encode(self.task.prompt + word).ids)
        ids = whole[len(frame) :]
        if whole[: len(frame)] != frame:
            ids = list(self._tokenizer.encode(word, add_special_tokens=False).ids)
        if not ids:
            raise ConfigError(f"task {self.task.name}: the word {word!r} has no tokens")
        return ids

    def _cut(self, text: str) -> Tokens:
        # Bisection on characters: token counts grow with the text, give or take a merge.
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._frame(text[:middle])) <= self._limit:
                low = middle
            else:
                high = middle - 1
        return self._frame(text[:low])


MAX_ROWS = 32
"""Most rows of a batch: onnxruntime-genai takes no more."""
READ_TOKENS = 128
"""Prompt tokens read at once, between looks at time and cancelling. The logits of all of them are
held in memory (100 MB for 512 tokens of a 49,152-token vocabulary), and 128 are no slower to read:
504 tokens on a 135 M model took 0.92 s at once, 0.78 s like this (two threads)."""


def batches(rows: Sequence[Sized], *, tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, each at most MAX_ROWS rows and, when padded, at
    most `tokens` (or one row)."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    group: list[int] = []
    for i in order:
        full = len(group) == MAX_ROWS or len(rows[i]) * (len(group) + 1) > tokens
        if group and full:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
