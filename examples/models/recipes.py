"""What the example models are: their sizes, how long they train, how an untrained one is built.

Knows nothing about text.
"""

from dataclasses import dataclass, replace

import transformers

SEED = 20261121


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides one model's weights, beside the corpus."""

    name: str
    family: str  # "llama", "qwen3" or "modernbert"
    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    context: int
    steps: int
    lr: float
    length: int = 256  # tokens per training window
    windows: int = 8  # per step
    micro: int = 8  # windows per backward pass: what fits the processor's cache
    seed: int = SEED
    muon_lr: float | None = None  # for the layers' matrices; None: AdamW for everything
    warm_up: int = 100  # steps
    decay: float = 0.25  # share of the steps, at the end, over which the rates fall to zero
    attention: str = "sdpa"  # "eager" takes an eighth less time per step on one core
    start: "Recipe | None" = None  # a whole run of the same sizes, whose weights this one continues

    @property
    def masked(self) -> bool:
        """Whether it is trained to fill gaps rather than to continue."""
        return self.family == "modernbert"

    @property
    def chain(self) -> "tuple[Recipe, ...]":
        """All runs that make the weights, in their order."""
        return (*(self.start.chain if self.start else ()), self)

    @property
    def steps_before(self) -> int:
        """Steps of the runs that this one continues."""
        return sum(run.steps for run in self.chain[:-1])


_LLM_FIRST = Recipe("llm-first", "llama", 320, 8, 5, 864, 8192, 512, steps=4000, lr=1.0e-3, micro=2)

# Every size is divisible by 32, so that the int4 export needs no padding of its blocks.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        replace(
            _LLM_FIRST,
            name="llm",
            start=_LLM_FIRST,
            steps=500,
            lr=5.0e-4,
            windows=16,
            muon_lr=0.006,
            warm_up=20,
            decay=0.7,
            attention="eager",
            seed=SEED + 1,  # other windows than the first run's
        ),
        Recipe("slm-a", "llama", 192, 4, 3, 512, 8192, 512, steps=5000, lr=2.0e-3),
        Recipe("slm-b", "qwen3", 192, 5, 3, 512, 4096, 512, steps=2500, lr=2.0e-3),
        Recipe(
            *("slm-c", "modernbert", 192, 4, 3, 512, 8192, 512),
            steps=3400,
            lr=2.0e-3,
            muon_lr=0.02,
            length=128,
            windows=16,
            micro=16,
            decay=0.5,
        ),
    )
}


def build(recipe: Recipe) -> transformers.PreTrainedModel:
    """The untrained model; its weights come from torch's current random state."""
    shared = {
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "intermediate_size": recipe.feed_forward,
        "vocab_size": recipe.vocabulary,
        "max_position_embeddings": recipe.context,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    decoder = {
        "num_key_value_heads": recipe.heads,
        "head_dim": recipe.width // recipe.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if recipe.family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, **decoder))
    if recipe.family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shared, **decoder))
    # Rotary positions and norms before each block: with BERT's learned positions and norms behind,
    # ten million tokens do not lead beyond the frequency of single words.
    marks = {f"{name}_token_id": number for number, name in enumerate(("pad", "unk", "cls", "sep"))}
    marks |= {"bos_token_id": marks["cls_token_id"], "eos_token_id": marks["sep_token_id"]}
    config = transformers.ModernBertConfig(**shared | marks, global_attn_every_n_layers=1)
    return transformers.ModernBertForMaskedLM(config)
