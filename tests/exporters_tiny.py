"""Tiny random decoder models with a byte tokenizer, for the tests of exporters."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def save_tiny(folder: Path, family: str = "Llama", **changes: Any) -> Path:
    """Save a seeded random `family`ForCausalLM and its tokenizer into `folder`."""
    torch.manual_seed(7)
    torch.set_num_threads(1)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(kind.config_class(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Larger than a fresh model's, so that logits differ clearly; norms stay near one.
            value.add_(torch.randn_like(value) * (0.1 if "norm" in name else 0.15))
    model.save_pretrained(folder)
    return save_tiny_tokenizer(folder)


def save_tiny_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of single bytes, 257 tokens, into `folder`."""
    vocabulary = {"<|end|>": 0}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    return folder
