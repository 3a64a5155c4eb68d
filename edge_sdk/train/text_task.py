"""A text task as torch batches, and what a causal language model says about them.

Knows token rows and how to ask a model for log-probabilities at chosen places. Does not know LoRA,
optimizers or where examples come from; how a text becomes tokens is `edge_sdk.prompts`.

Batches are padded on the right and carry no attention mask: under causal attention nothing real
ever sees the padding.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from edge_sdk.errors import ConfigError, DataError
from edge_sdk.prompts import TaskPrompts, Tokens, batches, load_tokenizer
from edge_sdk.train import head
from edge_sdk.wire.messages import TextTask

__all__ = [
    "Sequences",
    "TaskReader",
    "Tokens",
    "accuracy",
    "label_probs",
    "logits_at",
    "padded",
    "padded_width",
    "token_log_probs",
    "word_log_probs",
]

MAX_TOKENS = 128
"""Prompts are cut here by default; a request of 400 characters has about 100 tokens."""

SCORE_TOKENS = 4096
"""Padded tokens per scoring batch: large enough to feed the matrix units, small in memory."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences of which only the tokens from `starts[i]` on are to be predicted."""

    ids: list[Tokens]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, rows: Sequence[int]) -> "Sequences":
        """The sequences at `rows`, in that order."""
        return Sequences([self.ids[i] for i in rows], [self.starts[i] for i in rows])


class TaskReader(TaskPrompts):
    """The prompts of a task with their answers, and the tokenizer they are made with.

    Raises:
        ConfigError: as `TaskPrompts`, or generation_prompt lacks {label}.
    """

    def __init__(self, task: TextTask, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        super().__init__(task, tokenizer, max_tokens=max_tokens)
        if "{label}" not in task.generation_prompt:
            raise ConfigError(f"task {task.name}: its generation_prompt needs {{label}}")
        self.tokenizer = tokenizer

    @classmethod
    def from_folder(
        cls, task: TextTask, folder: Path | str, *, max_tokens: int = MAX_TOKENS
    ) -> "TaskReader":
        """A reader with the tokenizer of a bundle or model folder.

        `max_tokens` is lowered to the context length in the folder's config.json.

        Raises:
            ConfigError: tokenizer.json or config.json is missing or unreadable.
        """
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{path}: not a readable model configuration ({exc})") from exc
        context = int(config.get("max_position_embeddings", max_tokens))
        return cls(task, load_tokenizer(folder), max_tokens=min(max_tokens, context))

    def labelled(self, texts: Sequence[str], labels: Sequence[str]) -> Sequences:
        """Prompt plus label word; the word is what is to be predicted.

        Raises:
            DataError: a label is not of this task.
        """
        prompts = self.prompts(texts)
        words = [self.words[self.label_index(label)] for label in labels]
        ids = [prompt + word for prompt, word in zip(prompts, words, strict=True)]
        return Sequences(ids, [len(prompt) for prompt in prompts])


WIDTH_STEP = 8
"""Batches are this many tokens wide, or a multiple: the kernels that torch prepares and keeps for
each width took 120 MB more, of 870, with every width allowed."""


def padded_width(ids: Sequence[Tokens]) -> int:
    """Tokens that the widest of these rows takes in a batch."""
    return -(-max(map(len, ids)) // WIDTH_STEP) * WIDTH_STEP


def padded(ids: Sequence[Tokens]) -> torch.Tensor:
    """Token rows padded on the right with 0, (B, T) int64, T a multiple of WIDTH_STEP."""
    width = padded_width(ids)
    return torch.tensor([row + [0] * (width - len(row)) for row in ids])


def logits_at(
    model: Any, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Logits (n, vocab) float32 for what follows token `columns[j]` of row `rows[j]`.

    Only these n places go through the output layer, which on small models is a third of the work.
    """

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0][rows, columns][None],)  # (1, n, hidden)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits  # (1, n, vocab)
    finally:
        hook.remove()
    return logits[0].float()


def token_log_probs(model: Any, batch: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all tokens to be predicted, (n,), and the sequence each is of, (n,).

    From a model whose head is a plain product they come without its logits, in a fraction of the
    time and memory where tokens are many.
    """
    rows = [i for i, row in enumerate(batch.ids) for _ in range(batch.starts[i], len(row))]
    columns = [t - 1 for i, row in enumerate(batch.ids) for t in range(batch.starts[i], len(row))]
    wanted = [t for i, row in enumerate(batch.ids) for t in row[batch.starts[i] :]]
    owner, at, tokens = torch.tensor(rows), torch.tensor(columns), torch.tensor(wanted)
    if head.is_plain(model):
        return head.log_probs(model, padded(batch.ids), owner, at, tokens), owner
    logits = logits_at(model, padded(batch.ids), owner, at)
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0], owner


def word_log_probs(model: Any, reader: TaskReader, prompts: Sequence[Tokens]) -> torch.Tensor:
    """Log-probability of every label's word after each prompt, (B, labels).

    When the words' first tokens differ pairwise they alone decide, in one forward pass; else the
    log-probabilities of all tokens of each word are summed, one pass per label.
    """
    if reader.one_token_decides:
        last = torch.tensor([len(row) - 1 for row in prompts])
        logits = logits_at(model, padded(prompts), torch.arange(len(prompts)), last)
        firsts = torch.tensor([word[0] for word in reader.words])
        return torch.log_softmax(logits, dim=-1)[:, firsts]
    starts = [len(row) for row in prompts]
    columns = []
    for word in reader.words:
        chosen, owner = token_log_probs(model, Sequences([row + word for row in prompts], starts))
        columns.append(torch.zeros(len(prompts)).index_add(0, owner, chosen))
    return torch.stack(columns, dim=1)


def label_probs(
    model: Any, reader: TaskReader, texts: Sequence[str], *, temperature: float = 1.0
) -> torch.Tensor:
    """Probability of each label, (n, labels) float32, rows summing to 1; no gradient."""
    prompts = reader.prompts(texts)
    result = torch.zeros(len(prompts), len(reader.words))
    with torch.inference_mode():
        for rows in batches(prompts, tokens=SCORE_TOKENS):
            scores = word_log_probs(model, reader, [prompts[i] for i in rows])
            result[rows] = torch.softmax(scores / temperature, dim=-1)
    return result


def accuracy(model: Any, reader: TaskReader, texts: Sequence[str], labels: Sequence[str]) -> float:
    """Share of texts whose most probable label is the right one.

    Raises:
        DataError: no texts, or a label that is not of the task.
    """
    if not texts:
        raise DataError("accuracy needs at least one text")
    wanted = torch.tensor([reader.label_index(label) for label in labels])
    return float((label_probs(model, reader, texts).argmax(dim=1) == wanted).float().mean())
