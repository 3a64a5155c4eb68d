"""LoRA factors: attached, swapped, switched off, packed; the same over packed int4 layers."""

import numpy as np
import pytest
import torch
from learning_world import model
from safetensors.numpy import save

from compression.int4 import Packed
from compression.int4_layers import Int4Linear
from edge_sdk.errors import ConfigError, RemoteProtocolError
from edge_sdk.train.lora import (
    Adapter,
    LoraSpec,
    add,
    delta,
    from_bytes,
    start_factors,
    to_bytes,
    wire_exact,
)

SPEC = LoraSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
IDS = torch.tensor([[3, 4, 5, 6, 7]])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def random_factors(layout, seed=0):
    rng = np.random.default_rng(seed)
    return {key: rng.normal(0, 0.2, shape).astype(np.float32) for key, shape in layout.items()}


def logits(net):
    with torch.no_grad():
        return net(input_ids=IDS).logits


def test_factors_are_named_and_shaped_like_the_modules():
    adapter = Adapter(model(), SPEC)

    assert list(adapter.layout) == sorted(adapter.layout)
    assert adapter.layout["model.layers.0.self_attn.q_proj.lora_A"] == (4, 32)
    assert adapter.layout["model.layers.1.self_attn.v_proj.lora_B"] == (32, 4)
    assert len(adapter.layout) == 8
    trainable = [p for p in adapter.model.parameters() if p.requires_grad]
    assert len(trainable) == 8


def test_the_start_changes_nothing_and_is_the_same_everywhere():
    net = model()
    before = logits(net)

    adapter = Adapter(net, SPEC)
    start = start_factors(adapter.layout, 5)
    adapter.load(start)

    assert torch.equal(logits(net), before)
    again = start_factors(dict(reversed(adapter.layout.items())), 5)
    assert all(np.array_equal(start[key], again[key]) for key in start)
    assert all(np.array_equal(start[key], value) for key, value in wire_exact(start).items())
    other = start_factors(adapter.layout, 6)
    assert not np.array_equal(start["model.layers.0.self_attn.q_proj.lora_A"],
                              other["model.layers.0.self_attn.q_proj.lora_A"])  # fmt: skip


def test_loaded_factors_act_as_the_merged_weight_and_off_is_the_base():
    net, merged = model(), model()
    before = logits(net)
    adapter = Adapter(net, SPEC)
    factors = random_factors(adapter.layout)

    adapter.load(factors)

    with torch.no_grad():
        for key, A in factors.items():
            if key.endswith(".lora_A"):
                B = factors[key.removesuffix("A") + "B"]
                weight = merged.get_submodule(key.removesuffix(".lora_A")).weight
                weight += SPEC.scale * torch.from_numpy(B @ A)
    torch.testing.assert_close(logits(net), logits(merged), rtol=1e-4, atol=1e-5)
    with adapter.off():
        assert torch.equal(logits(net), before)
    torch.testing.assert_close(logits(net), logits(merged), rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(adapter.factors()[key], factors[key]) for key in factors)


def test_lora_over_packed_int4_equals_lora_over_the_same_dense_weights():
    def with_int4(dense: bool):
        net = model(seed=3)
        rng = np.random.default_rng(0)
        for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"):
            packed = Packed(
                bits=4,
                block=32,
                shape=(32, 32),
                codes=rng.integers(0, 256, (32, 16), dtype=np.uint8),
                scales=rng.uniform(0.01, 0.05, (32, 1)).astype(np.float32),
                zero_points=None,
            )
            layer = Int4Linear(packed, dtype=torch.float32)
            if dense:
                layer = torch.nn.Linear(32, 32, bias=False)
                layer.weight.data = torch.from_numpy(packed.dequantize())
            parent, _, child = path.rpartition(".")
            setattr(net.get_submodule(parent), child, layer)
        adapter = Adapter(net, SPEC)
        adapter.load(random_factors(adapter.layout))
        loss = net(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return float(loss.detach()), [p.grad for p in adapter.parameters()]

    packed_loss, packed_grads = with_int4(dense=False)
    dense_loss, dense_grads = with_int4(dense=True)

    assert packed_loss == pytest.approx(dense_loss, rel=1e-5)
    torch.testing.assert_close(packed_grads, dense_grads, rtol=1e-3, atol=1e-5)


def test_bytes_round_trip_is_exact_for_what_float16_holds():
    factors = wire_exact(random_factors({"a.lora_A": (2, 3), "a.lora_B": (4, 2)}))

    again = from_bytes(to_bytes(factors))

    assert all(np.array_equal(factors[key], again[key]) for key in factors)
    assert len(to_bytes(factors)) < 2 * 14 + 200


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"nonsense",
        to_bytes({"a.lora_A": np.ones((2, 2), np.float32)})[:-1],
        save({"a.lora_A": np.ones((2, 2), np.float32)}),
        save({"a.lora_A": np.ones(2, np.float16)}),
        save({"a.lora_A": np.full((2, 2), np.nan, np.float16)}),
    ],
)
def test_foreign_bytes_are_refused(blob):
    with pytest.raises(RemoteProtocolError):
        from_bytes(blob)


def test_values_beyond_float16_are_refused():
    with pytest.raises(RemoteProtocolError, match="float16"):
        to_bytes({"a.lora_A": np.full((1, 1), 1e6, np.float32)})


def test_delta_and_add_are_inverse_and_refuse_other_layouts():
    layout = {"a.lora_A": (2, 3), "a.lora_B": (4, 2)}
    old, new = random_factors(layout, 1), random_factors(layout, 2)

    again = add(old, delta(new, old))

    assert all(np.allclose(again[key], new[key], atol=1e-7) for key in new)
    with pytest.raises(RemoteProtocolError, match=r"a\.lora_B is missing"):
        delta({"a.lora_A": old["a.lora_A"]}, old)
    with pytest.raises(RemoteProtocolError, match="shape"):
        add(old, old | {"a.lora_A": np.zeros((3, 3), np.float32)})


def test_a_target_no_layer_has_is_named():
    with pytest.raises(ConfigError, match="z_proj"):
        Adapter(model(), LoraSpec(2, 4.0, ("z_proj",)))
