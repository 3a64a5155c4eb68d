"""Trains and saves the example models' tokenizers.  Knows nothing about weights."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from examples.data.corpus import VERBALISERS, Texts
from examples.models.recipes import SEED, Recipe

END = "<|endoftext|>"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_CHARS = 400_000  # per stream: enough for 8192 pieces, and no corpus drowns the others
RARE_LETTER = 20  # letters seen less often become [UNK]
VERBALISER_WEIGHT = 2_000  # times each label word is shown, so that it becomes one token


def train_tokenizer(recipe: Recipe, texts: Mapping[str, Texts]) -> Tokenizer:
    """Byte-level BPE, or lower-cased WordPiece for masked models; label words are single tokens."""
    make = _word_pieces if recipe.masked else _byte_pairs
    tokenizer = make(recipe.vocabulary, list(_sample(texts)))
    check_verbalisers(tokenizer)
    return tokenizer


def _sample(texts: Mapping[str, Texts]) -> Iterator[str]:
    for train, _ in texts.values():
        rng = np.random.default_rng(SEED)
        left = TOKENIZER_CHARS
        for index in rng.permutation(len(train)):
            if left <= 0:
                break
            left -= len(train[index])
            yield train[index]
    yield from ["".join(VERBALISERS)] * VERBALISER_WEIGHT


def _byte_pairs(vocabulary: int, texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _word_pieces(vocabulary: int, texts: list[str]) -> Tokenizer:
    trained = _bert_tokenizer({mark: number for number, mark in enumerate(BERT_SPECIALS)})
    letters = _letters(trained, texts)
    # The trainer numbers "##x" in the order of a hash map, and ties follow the numbers: without
    # numbering them first, no two runs give the same vocabulary.  Handing them over as special
    # tokens does that; the tokenizer built anew from the vocabulary knows them as plain pieces.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*BERT_SPECIALS, *("##" + letter for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return _bert_tokenizer(trained.get_vocab())


def _bert_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(BERT_SPECIALS))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(mark, BERT_SPECIALS.index(mark)) for mark in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _letters(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    counts = Counter(tokenizer.normalizer.normalize_str(" ".join(texts)))
    return sorted(
        letter for letter, n in counts.items() if n >= RARE_LETTER and not letter.isspace()
    )


def check_verbalisers(tokenizer: Tokenizer) -> None:
    """The first tokens of the eight label words differ, so one step can tell labels apart."""
    first = [tokenizer.encode(word, add_special_tokens=False).ids[0] for word in VERBALISERS]
    assert len(set(first)) == len(VERBALISERS), f"label words share a first token: {first}"


def save_tokenizer(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer files that transformers and onnxruntime-genai both read."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": recipe.context,
        "clean_up_tokenization_spaces": False,
    }
    if recipe.masked:
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        config |= dict(zip(names, BERT_SPECIALS, strict=True))
    else:
        config |= {"bos_token": END, "eos_token": END, "pad_token": END, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
