"""Open answers: written greedily, measured by Rouge-L.

Knows token rows of a causal model. Does not know tasks' files or devices.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from edge_sdk.prompts import TaskPrompts, Tokens, load_tokenizer

ROWS = 64


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]; case and punctuation do not count.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3, beta 1.
    """
    said, wanted = _words(answer), _words(reference)
    if not said or not wanted:
        return float(said == wanted)
    before = [0] * (len(wanted) + 1)
    for word in said:
        row = [0]
        for j, other in enumerate(wanted):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
        before = row
    return 2 * before[-1] / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def write_answers(
    model: Any, reader: TaskPrompts, folder: Any, texts: Sequence[str], *, most_tokens: int
) -> list[str]:
    """The likeliest continuation of each text's prompt, up to a newline.

    `folder` holds the tokenizer. Prompts of one batch are padded on the left.
    """
    tokenizer = load_tokenizer(folder)
    prompts = reader.prompts(texts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        for i, tokens in zip(
            rows, _continue(model, [prompts[i] for i in rows], most_tokens), strict=True
        ):
            answers[i] = tokenizer.decode(tokens).split("\n", 1)[0].strip()
    return answers


def _continue(model: Any, prompts: Sequence[Tokens], most: int) -> list[Tokens]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=real,
            do_sample=False,
            max_new_tokens=most,
            pad_token_id=0,
        )
    return [row[width:] for row in out.tolist()]
