"""Several answers written together.

Knows which prompts may share a batch, and one generator with a row for each. Does not know text
(answer.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from edge_sdk.answer import Finish, Strand, failure, stopped_by
from edge_sdk.generation import Request
from edge_sdk.prompts import Tokens, batches

MANY_TOKENS = 4096
"""Tokens of prompts and answers held at once, where no ceiling of memory is set."""


def groups(
    rows: Sequence[Tokens], request: Request, *, context: int, tokens: int
) -> Iterator[list[int]]:
    """Row numbers to be written together, each row as it would be alone.

    `tokens`: most of prompts and answers at once, padding included, or one row.
    """
    full = [range(len(row) + request.max_tokens) for row in rows]
    # A row that the context cuts short would cut the others; and a grammar that one row has come
    # to the end of ends the others with an error.
    alone = [i for i, row in enumerate(full) if request.schema or len(row) > context]
    yield from ([i] for i in alone)
    rest = sorted(set(range(len(rows))) - set(alone))
    for batch in batches([full[i] for i in rest], tokens=tokens):
        yield [rest[i] for i in batch]


def write_many(
    generator: Any, strands: Sequence[Strand], request: Request, *, limit: int, started: float
) -> None:
    """Let one generator, which has read one prompt per strand, write all their answers.

    Raises:
        RuntimeFailure: the model failed.
    """
    stopped: Finish = ""
    try:
        for _ in range(limit):
            if stopped := stopped_by(request, started):
                break
            generator.generate_next_token()
            for strand, token in zip(strands, generator.get_next_tokens(), strict=True):
                if not strand.finish:
                    strand.feed(int(token))
            if generator.is_done() or all(strand.finish for strand in strands):
                break
    except RuntimeError as exc:
        raise failure(exc) from None
    for strand in strands:
        strand.end(stopped or "length")
