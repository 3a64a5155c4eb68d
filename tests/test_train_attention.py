"""Training's own attention: the same numbers as torch's, taken only where it is meant to be."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from edge_sdk.train import attention
from edge_sdk.train.lora import Adapter, LoraSpec

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen2, sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "modernbert": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**SMALL, local_attention=6, cls_token_id=1, sep_token_id=2)
    ),
}
ROWS = torch.tensor([[*range(3, 19)], [*range(30, 40), 0, 0, 0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def gradients(net: torch.nn.Module, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The weighted sum of what the model says, and its gradients in every weight."""
    net.zero_grad()
    said = net(input_ids=ROWS, attention_mask=mask).logits
    if mask is not None and said.ndim == 3:
        said = said * mask[:, :, None]  # what padding says is no matter
    loss = (said * torch.linspace(-1, 1, said.numel()).view(said.shape)).sum()
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_it_gives_the_gradients_of_torchs_own(
    monkeypatch: pytest.MonkeyPatch, kind: str, masked: bool
) -> None:
    torch.manual_seed(0)
    net = MODELS[kind]().eval()
    mask = (ROWS > 0).long() if masked else None
    taken = []
    plain = attention.plain
    monkeypatch.setattr(attention, "plain", lambda *a: taken.append(1) or plain(*a))
    wanted = gradients(net, mask)

    attention.use(net)
    found = gradients(net, mask)

    assert len(taken) == 3
    assert len(found) == len(wanted) > 10
    assert all(float(g.abs().max()) > 0 for g in wanted[:5])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_16_bit_numbers_are_as_near_the_exact_ones_as_torchs() -> None:
    draw = torch.Generator().manual_seed(1)
    exact = [torch.randn(2, h, 40, 16, generator=draw).double() for h in (6, 2, 2)]
    upstream = torch.randn(2, 40, 6, 16, generator=draw).double()
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]

    def run(attend, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in exact]
        seen, _ = attend(module, *inputs, None)
        seen.backward(upstream.to(dtype))
        return [seen.detach().double(), *(x.grad.double() for x in inputs)]

    truth = run(attention.sdpa_attention_forward, torch.float64)
    theirs = run(attention.sdpa_attention_forward, torch.bfloat16)
    ours = run(attention.attend, torch.bfloat16)

    for true, one, other in zip(truth, ours, theirs, strict=True):
        assert (one - true).norm() < 0.01 * true.norm()
        assert (one - true).norm() < 2 * (other - true).norm()


def test_torchs_own_is_taken_without_gradients_for_long_rows_and_with_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SHORT_TOKENS", 16)
    taken = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *a, **k: (taken.append(a[1].shape[2]), None)
    )
    module = torch.nn.Module()

    def ask(width: int, **how: float) -> None:
        x = torch.ones(1, 2, width, 4, requires_grad=True)
        attention.attend(module, x, x, x, None, **how)

    ask(16)
    assert taken == []
    ask(17)
    ask(8, dropout=0.1)
    ask(9, softcap=30.0)
    with torch.no_grad():
        ask(10)
    assert taken == [17, 8, 9, 10]


def test_an_adapter_has_its_model_use_it_unless_the_model_has_its_own() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**GROUPED))
    capped = Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, attn_implementation="eager"))

    for net in (llama, capped):
        Adapter(net, LoraSpec(2, 4.0, ("q_proj",)))

    assert llama.config._attn_implementation == attention.NAME
    assert capped.config._attn_implementation == "eager"
