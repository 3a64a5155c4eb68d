"""What each token of a vocabulary adds to a text, and the nearest token of another vocabulary.

Knows tokenizers' ways of writing bytes, and Levenshtein distances. Does not know texts, logits or
models.

Every token is taken as the bytes it stands for, so that a byte-level BPE ("Ġthe"), SentencePiece
("▁the") and WordPiece ("the", whose inner pieces are "##the") say " the" alike. That is FedMKT's
"special prefix mapped", done once for all.

Source: MinED, FedMKT (arXiv 2406.02224) section 3.3; PAPERS.md 2 (b). Differences from the paper: a
special token (end of text, padding) has a counterpart only in one of the same name, else none.
"""

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edge_sdk.errors import RemoteProtocolError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

I32 = npt.NDArray[np.int32]

NONE = -1
"""In a table: this token has no counterpart."""

MOST_TOKENS = 1 << 20
"""Most tokens of a vocabulary that is read from bytes."""
MOST_SURFACE = 1 << 10
"""Most bytes of one of its tokens."""

_Bytes = Annotated[bytes, Meta(max_length=MOST_SURFACE)]
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_ROWS = 2048
"""Source tokens compared at a time: with 4,000 candidates of a length, 8 MB of distances."""


class _Packed(msgspec.Struct, array_like=True):
    surfaces: Annotated[tuple[_Bytes, ...], Meta(min_length=1, max_length=MOST_TOKENS)]
    specials: Annotated[
        tuple[tuple[Annotated[str, Meta(max_length=MOST_SURFACE)], int], ...],
        Meta(max_length=MOST_TOKENS),
    ]


@dataclass(frozen=True)
class Vocabulary:
    """One model's tokens.

    Attributes:
        surfaces: by id, the bytes a token adds to a text; b"" for an id that stands for nothing.
        specials: ids of tokens that are no text, by name.
    """

    surfaces: tuple[bytes, ...]
    specials: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.surfaces)

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "Vocabulary":
        """The vocabulary of a byte-level BPE, SentencePiece-like, WordPiece or word tokenizer."""
        plan = json.loads(tokenizer.to_str())
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        named = {added["content"] for added in plan["added_tokens"] if added["special"]}
        prefix = plan["model"].get("continuing_subword_prefix") or ""
        style = json.dumps([plan.get("pre_tokenizer"), plan.get("decoder")])
        surfaces = [b""] * (max(tokens.values()) + 1)
        for token, i in tokens.items():
            if token in named:
                continue
            if '"ByteLevel"' in style:
                surfaces[i] = byte_level(token)
            elif plan["model"]["type"] == "WordPiece":
                surfaces[i] = word_piece(token, prefix)
            else:
                surfaces[i] = sentence_piece(token)
        special = sorted((name, tokens[name]) for name in named if name in tokens)
        return cls(tuple(surfaces), tuple(special))

    def to_bytes(self) -> bytes:
        """All of it, for whoever has another tokenizer; about 8 bytes a token."""
        return msgspec.msgpack.encode(_Packed(self.surfaces, self.specials))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Vocabulary":
        """Take up what `to_bytes` returned.

        Raises:
            RemoteProtocolError: it is no such thing, or too large.
        """
        try:
            packed = msgspec.msgpack.decode(data, type=_Packed)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise RemoteProtocolError(f"not a vocabulary: {exc}") from exc
        if any(not 0 <= i < len(packed.surfaces) for _, i in packed.specials):
            raise RemoteProtocolError("a special token is outside its vocabulary")
        return cls(packed.surfaces, packed.specials)

    @cached_property
    def digest(self) -> str:
        """Names the vocabulary: equal ones have equal digests, others do not."""
        sha = hashlib.sha256()
        for surface in self.surfaces:
            sha.update(len(surface).to_bytes(4, "big") + surface)
        sha.update(json.dumps(self.specials).encode())
        return sha.hexdigest()

    @cached_property
    def bare(self) -> tuple[str, ...]:
        """The surfaces without leading spaces, one character a byte, for comparisons."""
        return tuple(surface.lstrip(b" ").decode("latin-1") for surface in self.surfaces)

    @cached_property
    def bare_sizes(self) -> I32:
        """Bytes of each token's surface that are no leading space, (V,)."""
        return np.array([len(word) for word in self.bare], np.int32)


def byte_level(token: str) -> bytes:
    """The bytes of a byte-level BPE token; one with other characters is taken as its UTF-8."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def sentence_piece(token: str) -> bytes:
    """The bytes of a SentencePiece token: "▁" is a space, "<0x0A>" is that byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def word_piece(token: str, prefix: str = "##") -> bytes:
    """The bytes of a WordPiece token: one that does not continue a word follows a space."""
    inner = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
    return token[len(prefix) :].encode() if inner else b" " + token.encode()


def mined_table(source: Vocabulary, target: Vocabulary, *, threads: int = 1) -> I32:
    """The target token nearest to every source token, (len(source),); NONE for none.

    The identical surface where there is one (of equal ones the lowest id), else the surface of the
    least Levenshtein distance in bytes, among equally near ones the first in byte order. Exact:
    candidates are looked at by length, and a length is left out only when its distance from the
    token's own length already exceeds the best distance found.
    """
    places: dict[bytes, int] = {}
    for i in range(len(target) - 1, -1, -1):
        places[target.surfaces[i]] = i
    places.pop(b"", None)
    table = np.full(len(source), NONE, np.int32)
    for i, surface in enumerate(source.surfaces):
        table[i] = places.get(surface, NONE)
    for name, i in source.specials:
        table[i] = dict(target.specials).get(name, NONE)
    special = {i for _, i in source.specials}
    lost = [i for i in np.flatnonzero(table == NONE).tolist() if i not in special]
    lost = [i for i in lost if source.surfaces[i]]
    if lost and places:
        words = sorted(places)
        found = _nearest([source.surfaces[i] for i in lost], words, threads)
        ids = np.array([places[word] for word in words], np.int32)
        table[lost] = ids[found]
    return table


def cached_table(source: Vocabulary, target: Vocabulary, cache: Path, *, threads: int = 1) -> I32:
    """As `mined_table`, kept in the folder `cache` under the digests of both vocabularies."""
    path = cache / f"mined-{source.digest[:24]}-{target.digest[:24]}.npy"
    try:
        table = np.load(path, allow_pickle=False)
        whole = table.shape == (len(source),) and table.dtype == np.int32
        if whole and ((table >= NONE) & (table < len(target))).all():
            return np.asarray(table, np.int32)
        logger.warning("%s is not the table it should be; it is made again", path.name)
    except (OSError, ValueError, EOFError):
        pass  # absent, or damaged: made again
    table = mined_table(source, target, threads=threads)
    cache.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=cache, suffix=".npy")
    with os.fdopen(handle, "wb") as file:
        np.save(file, table)
    os.replace(draft, path)
    return table


def _nearest(wanted: list[bytes], words: list[bytes], threads: int) -> npt.NDArray[np.int64]:
    """For each of `wanted` the place of its nearest in `words`, which are in byte order."""
    sizes, lengths = np.array(list(map(len, words))), np.array(list(map(len, wanted)))
    texts = np.array([word.decode("latin-1") for word in words], object)
    asked = np.array([word.decode("latin-1") for word in wanted], object)
    by_size = {int(size): np.flatnonzero(sizes == size) for size in np.unique(sizes)}
    result = np.zeros(len(wanted), np.int64)
    for length in np.unique(lengths).tolist():
        group = np.flatnonzero(lengths == length)
        for start in range(0, len(group), _ROWS):
            rows = group[start : start + _ROWS]
            result[rows] = _nearest_of_length(asked[rows], int(length), texts, by_size, threads)
    return result


def _nearest_of_length(
    asked: npt.NDArray[np.object_],
    length: int,
    texts: npt.NDArray[np.object_],
    by_size: dict[int, npt.NDArray[np.intp]],
    threads: int,
) -> npt.NDArray[np.int64]:
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    best = np.full(len(asked), np.iinfo(np.int64).max >> 1)  # distance * words + place
    n = len(texts)
    for radius in range(max(length, max(by_size)) + 1):
        open_ = np.flatnonzero(best // n >= radius)  # a tie counts: it may come first in order
        if not len(open_):
            break
        for size in {length - radius, length + radius}:
            places = by_size.get(size)
            if places is None:
                continue
            far = cdist(
                asked[open_], texts[places], scorer=Levenshtein.distance, dtype=np.uint16,
                workers=threads,
            )  # fmt: skip
            first = far.argmin(axis=1)  # (open,); the first of the least is first in byte order
            key = far[np.arange(len(open_)), first].astype(np.int64) * n + places[first]
            best[open_] = np.minimum(best[open_], key)
    return best % n


def _byte_alphabet() -> dict[str, int]:
    # GPT-2's: printable bytes stand for themselves, the others for the characters from 256 on.
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {chr(byte): byte for byte in _PRINTABLE} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()
