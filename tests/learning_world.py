"""A tiny world for the learning tests: a word tokenizer, random Llamas, a task with a rule."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from edge_sdk.wire.messages import TextTask

TASK = TextTask(
    name="kinds",
    prompt="Request: {text}\nKind:",
    generation_prompt="Kind: {label}\nRequest:",
    labels=("sum", "story", "list"),
    words=(" sum", " story", " list"),
)
SIGNS = {"sum": ("add", "plus"), "story": ("tell", "once"), "list": ("name", "items")}
FILLERS = ("the", "a", "of", "my", "two", "red", "big", "cat", "dog", "house", "now", "please")


def tokenizer() -> Tokenizer:
    """One token per word, with its space; newline apart."""
    words = ["Request", "Kind", ":", "\n", "Ċ"]
    plain = [*FILLERS, *TASK.labels, *(w for pair in SIGNS.values() for w in pair)]
    vocab = ["<pad>", *words, *plain, *(f"\u0120{w}" for w in plain), "<unk>"]
    made = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(vocab))}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def model(*, width: int = 32, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        vocab_size=tokenizer().get_vocab_size(),
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def folder(path: Path, **how: int) -> Path:
    """A Hugging Face folder of a random model."""
    path.mkdir(parents=True, exist_ok=True)
    model(**how).save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    assert "max_position_embeddings" in json.loads((path / "config.json").read_text())
    return path


def examples(n: int, *, seed: int) -> list[tuple[str, str]]:
    """Texts whose label follows from one sign word among fillers."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        label = TASK.labels[int(rng.integers(len(TASK.labels)))]
        words = [str(w) for w in rng.choice(FILLERS, size=4)]
        words.insert(int(rng.integers(5)), str(rng.choice(SIGNS[label])))
        rows.append((" ".join(words), label))
    return rows
