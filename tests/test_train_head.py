"""What tokens are given, without logits: the same numbers and gradients, little kept."""

from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from compression.int4_torch import load_slm
from edge_sdk.train import head
from edge_sdk.train.lora import Adapter, LoraSpec, start_factors
from edge_sdk.train.text_task import Sequences, logits_at, padded, token_log_probs
from examples.training_lab import write_bundle

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))
WORDS = 500
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS = torch.randint(0, WORDS, (3, 17), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(**SMALL, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    return write_bundle(tmp_path_factory.mktemp("small"), config)


def adapted(bundle: Path, *, packed: bool, dtype: torch.dtype = torch.float32) -> Adapter:
    adapter = Adapter(load_slm(bundle, packed=packed, dtype=dtype), SPEC)
    adapter.load(start_factors(adapter.layout, 0))
    return adapter


def by_logits(model, batch: Sequences) -> torch.Tensor:
    at = [(i, t) for i, row in enumerate(batch.ids) for t in range(batch.starts[i], len(row))]
    rows, columns = (torch.tensor(x) for x in zip(*at, strict=True))
    tokens = torch.tensor([batch.ids[i][t] for i, t in at])
    logits = logits_at(model, padded(batch.ids), rows, columns - 1)
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("tile", [32 * 96, 2**20])
@pytest.mark.parametrize("packed", [False, True])
def test_they_are_what_the_logits_say_and_so_are_gradients(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, packed: bool, tile: int
) -> None:
    for module in ("compression.int4_layers", "edge_sdk.train.head"):
        monkeypatch.setattr(f"{module}.TILE_WEIGHTS", tile)
    adapter = adapted(bundle, packed=packed)
    batch = Sequences(ROWS, [1, 5, 16])
    weights = torch.linspace(-1, 2, 16 + 12 + 1)

    found, owner = token_log_probs(adapter.model, batch)
    (found * weights).sum().backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    wanted = by_logits(adapter.model, batch)
    (wanted * weights).sum().backward()

    assert head.is_plain(adapter.model)
    assert owner.tolist() == [0] * 16 + [1] * 12 + [2]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for found_grad, p in zip(gradients, adapter.parameters(), strict=True):
        torch.testing.assert_close(found_grad, p.grad, rtol=1e-3, atol=1e-5)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3


def test_a_likely_tokens_gradient_does_not_drown_in_rounding() -> None:
    """16-bit products round at a 256th of a word's vector; what is left here is a millionth."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 40, bias=False).bfloat16()
    layer.requires_grad_(False)
    with torch.no_grad():
        layer.weight[7] += 1
    hidden = (layer.weight[7] / 4)[None].clone()
    token = torch.tensor([7])

    def gradient(x: torch.Tensor, of) -> torch.Tensor:
        x = x.clone().requires_grad_()
        of(x).backward()
        return x.grad.double()

    found = gradient(hidden, lambda x: head._LogProbs.apply(x, layer, token).sum())
    exact = gradient(
        hidden.double(), lambda x: torch.log_softmax(x @ layer.weight.double().T, -1)[0, 7]
    )

    assert 0 < exact.norm() < 1e-4 * layer.weight[7].double().norm()
    assert (found - exact).norm() < 0.2 * exact.norm()  # logits round too


def test_nothing_of_the_logits_is_kept(bundle: Path) -> None:
    adapter, kept = adapted(bundle, packed=True), []
    batch = Sequences(ROWS, [1, 1, 1])
    hidden = torch.randn(48, 32, requires_grad=True)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel()), t)[1], lambda t: t
    ):
        layer = adapter.model.get_output_embeddings()
        head._LogProbs.apply(hidden, layer, torch.arange(48))
    with torch.inference_mode():
        found, _ = token_log_probs(adapter.model, batch)

    assert kept == [48 * 32]
    torch.testing.assert_close(found, by_logits(adapter.model, batch).detach())


def test_a_head_that_does_more_than_multiply_is_asked_for_its_logits() -> None:
    batch = Sequences(ROWS, [1, 1, 1])
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=90.0))
    trained = LlamaForCausalLM(LlamaConfig(**SMALL))

    for net in (capped.requires_grad_(False).eval(), trained.eval()):
        assert not head.is_plain(net)
        found, _ = token_log_probs(net, batch)
        torch.testing.assert_close(found, by_logits(net, batch))
    assert head.is_plain(trained.requires_grad_(False))
