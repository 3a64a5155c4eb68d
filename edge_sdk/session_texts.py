"""What a text is to an open decoder: tokens, in the model's own form of a chat, within its context.

Knows a tokenizer, a chat template and the size of a context. Does not know the model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.chat_template import ChatTemplate, Messages
from edge_sdk.errors import RuntimeFailure
from edge_sdk.prompts import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class SessionTexts:
    """Reads and writes texts as one bundle's tokens.

    Attributes:
        context: most tokens of prompt and answer together.
    """

    def __init__(self, folder: Path, tokenizer: "Tokenizer", *, context: int) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        borders = [token.content for token in added if token.special]
        self.context = context
        self._tokenizer = tokenizer
        self._template = ChatTemplate(folder, borders=borders)

    def chat_prompt(self, messages: Messages, *, answer: bool = True) -> str:
        """Return `messages`, each with a role and content, as one prompt in the model's own form.

        The bundle's chat template decides the form; without one it is "User: ...\\nAssistant:".

        Raises:
            RuntimeFailure: no messages, an unknown role, or a template that refuses or fails.
        """
        return self._template.render(messages, answer=answer)

    def encode(self, text: str, *, special: bool = True) -> Tokens:
        """Return the token ids of `text`; with `special`, with those that begin a text."""
        begin = self._template.begin
        special = special and not (begin and text.startswith(begin))
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special ones left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def count(self, text: str) -> int:
        """Return how many tokens `text` has as a prompt."""
        return len(self.encode(text))

    def _prompt_ids(self, prompt: str) -> Tokens:
        if not prompt.strip():
            raise RuntimeFailure("the prompt is empty; write at least a word")
        ids = self.encode(prompt)
        if not ids:
            raise RuntimeFailure("the prompt has no tokens this model knows")
        self._check_room(len(ids))
        return ids

    def _check_room(self, tokens: int) -> None:
        if tokens >= self.context:
            raise RuntimeFailure(
                f"the prompt has {tokens} tokens and the model's context is {self.context}; "
                f"shorten it to at most {self.context - 1}"
            )
