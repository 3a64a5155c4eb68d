"""The weights that run are the weights that train: reading, dequantizing, packed against dense."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compression.errors import WeightsError
from compression.int4 import WeightFile
from compression.int4_layers import Int4Embedding, Int4Linear, Tiles, scales_dtype
from compression.int4_torch import held_bytes, load_slm

BLOCK = 32


class BundleWriter:
    """Writes a bundle's data file and weights.json the way the exporter promises to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.tensors = folder, bytearray(b"\0" * 5), {}

    def put(self, array: np.ndarray) -> list[int]:
        offset = len(self.data)
        self.data += array.tobytes()
        return [offset, array.nbytes]

    def dense(self, name: str, array: np.ndarray) -> None:
        self.tensors[name] = {
            "kind": "dense",
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "data": self.put(array),
        }

    def blockwise(
        self,
        name: str,
        weight: np.ndarray,
        *,
        bits: int = 4,
        zeros: bool = False,
        like_the_exporter: bool = False,
    ):
        rows, columns = weight.shape
        count = -(-columns // BLOCK)
        padded = np.zeros((rows, count * BLOCK), np.float32)
        padded[:, :columns] = weight
        blocks = padded.reshape(rows, count, BLOCK)
        half = 2 ** (bits - 1)
        scales = (np.abs(blocks).max(-1) / (half - 1) + 1e-8).astype(np.float32)
        if like_the_exporter:
            scales = (np.abs(blocks).max(-1) / half).astype(np.float32)
        zero = np.full((rows, count), half, np.uint8)
        if zeros:
            zero[:, ::2] -= 1
        codes = np.clip(np.round(blocks / scales[..., None]) + zero[..., None], 0, 2 * half - 1)
        codes = codes.astype(np.uint8).reshape(rows, -1)
        self.tensors[name] = {
            "kind": "blockwise",
            "bits": bits,
            "block": BLOCK,
            "shape": [rows, columns],
            "packed": self.put(pack(codes, bits)),
            "scales": [*self.put(scales), "float32"],
            "zero_points": self.put(pack(zero, bits)) if zeros else None,
        }
        full = codes.reshape(blocks.shape).astype(np.float32) - zero[..., None]
        return (full * scales[..., None]).reshape(rows, -1)[:, :columns]

    def close(self) -> None:
        (self.folder / "model.onnx.data").write_bytes(self.data)
        index = {"format": 1, "data": "model.onnx.data", "tensors": self.tensors}
        (self.folder / "weights.json").write_text(json.dumps(index))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, ::2] | (codes[:, 1::2] << 4)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A two-layer Llama with a tied int8 embedding and int4 linear layers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    writer = BundleWriter(tmp_path)
    for name, value in LlamaForCausalLM(config).state_dict().items():
        array = value.numpy().astype(np.float32)
        if name == "lm_head.weight":
            writer.tensors[name] = {"kind": "alias", "of": "model.embed_tokens.weight"}
        elif array.ndim == 2:
            writer.blockwise(name, array, bits=8 if "embed" in name else 4, zeros="q_proj" in name)
        else:
            writer.dense(name, array)
    writer.close()
    return tmp_path


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("columns", [32, 80, 96])
def test_dequantizes_what_was_packed(tmp_path: Path, bits: int, zeros: bool, columns: int) -> None:
    weight = np.random.default_rng(1).normal(size=(7, columns)).astype(np.float32)
    writer = BundleWriter(tmp_path)
    expected = writer.blockwise("w", weight, bits=bits, zeros=zeros)
    writer.close()

    packed = WeightFile(tmp_path).packed("w")

    np.testing.assert_array_equal(packed.dequantize(), expected)
    layer = Int4Linear(packed, dtype=torch.float32)
    np.testing.assert_array_equal(layer.weight.numpy(), expected)


def test_rows_stored_without_padding_are_read(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(6, 80)).astype(np.float32)
    writer = BundleWriter(tmp_path)
    expected = writer.blockwise("w", weight)
    start = writer.tensors["w"]["packed"][0]
    codes = np.frombuffer(bytes(writer.data[start:]), np.uint8)[: 6 * 48].reshape(6, 48)
    writer.tensors["w"]["packed"] = writer.put(np.ascontiguousarray(codes[:, :40]))
    writer.close()

    packed = WeightFile(tmp_path).packed("w")

    np.testing.assert_array_equal(packed.dequantize(), expected)
    np.testing.assert_array_equal(Int4Linear(packed, dtype=torch.float32).weight, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("tile", [32 * 96, 2**20])
def test_tiled_layer_equals_the_dense_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int, zeros: bool, tile: int
) -> None:
    monkeypatch.setattr("compression.int4_layers.TILE_WEIGHTS", tile)
    weight = np.random.default_rng(1).normal(size=(70, 80)).astype(np.float32)
    writer = BundleWriter(tmp_path)
    expected = torch.from_numpy(writer.blockwise("w", weight, bits=bits, zeros=zeros))
    writer.close()
    layer = Int4Linear(WeightFile(tmp_path).packed("w"), dtype=torch.float32)
    x = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(2)).requires_grad_()

    assert layer.tiles.count == (3 if tile < 2**20 else 1)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)

    reference = x @ expected.T
    (wanted,) = torch.autograd.grad(reference.square().sum(), x)
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-3)


def test_16_bit_tiles_round_the_stored_values_once(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(50, 80)).astype(np.float32)
    writer = BundleWriter(tmp_path)
    expected = torch.from_numpy(writer.blockwise("w", weight)).bfloat16()
    writer.close()
    tiles = Tiles(WeightFile(tmp_path).packed("w"))
    x = torch.randn(9, 80, generator=torch.Generator().manual_seed(2)).bfloat16()

    assert torch.equal(tiles.tile(0, torch.bfloat16), expected.T)
    torch.testing.assert_close(Int4Linear(tiles, dtype=torch.bfloat16)(x), x @ expected.T)


@pytest.mark.parametrize("made_from", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_made_from_16_bits_are_held_in_16(tmp_path: Path, made_from: torch.dtype) -> None:
    """The exporter's scale is a weight divided by a power of two, so it has the weight's bits."""
    weight = torch.from_numpy(np.random.default_rng(1).normal(size=(7, 96))).to(made_from).float()
    writer = BundleWriter(tmp_path)
    writer.blockwise("w", weight.numpy(), like_the_exporter=True)
    writer.close()
    packed = WeightFile(tmp_path).packed("w")

    layer = Int4Linear(packed, dtype=torch.float32)

    assert scales_dtype(packed) == made_from
    assert layer.tiles.nbytes == 16 * (96 // 2 + 96 // BLOCK * made_from.itemsize)
    np.testing.assert_array_equal(layer.weight.numpy(), packed.dequantize())


def test_an_embedding_dequantizes_the_rows_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compression.int4_layers.TILE_WEIGHTS", 32 * 96)
    weight = np.random.default_rng(1).normal(size=(70, 80)).astype(np.float32)
    writer = BundleWriter(tmp_path)
    expected = torch.from_numpy(writer.blockwise("w", weight, bits=8, zeros=True))
    writer.close()
    tiles = Tiles(WeightFile(tmp_path).packed("w"))
    layer = Int4Embedding(tiles, like=torch.nn.Embedding(70, 80), dtype=torch.float32)
    ids = torch.tensor([[0, 69, 31], [32, 32, 5]])

    one, all_of_them = layer(ids[:1, :1]), layer(ids)  # the second call must not spoil the first

    assert torch.equal(one, expected[ids[:1, :1]])
    assert torch.equal(all_of_them, expected[ids])
    assert torch.equal(layer.weight, expected)


def test_weights_are_held_as_asked(bundle: Path) -> None:
    assert load_slm(bundle).symbiont_weights == "16-bit"
    assert load_slm(bundle, dtype=torch.float32).symbiont_weights == "32-bit"
    model = load_slm(bundle, packed=True)
    assert model.symbiont_weights == "int4 on the fly"
    assert isinstance(model.model.layers[0].mlp.up_proj, Int4Linear)
    assert model.lm_head.tiles is model.model.embed_tokens.tiles
    assert model.dtype == torch.bfloat16


def test_held_bytes_are_those_of_the_model(bundle: Path) -> None:
    dense = sum(p.nbytes for p in set(load_slm(bundle).parameters()))
    assert held_bytes(bundle, packed=False, dtype=torch.bfloat16) == dense

    model = load_slm(bundle, packed=True)
    tiles = {m.tiles for m in model.modules() if isinstance(m, Int4Linear)}
    packed = sum(t.nbytes for t in tiles) + sum(p.nbytes for p in model.parameters())
    counted = held_bytes(bundle, packed=True, dtype=torch.bfloat16)
    assert counted == pytest.approx(packed, rel=0.35)  # rows of 48 and 80 are padded to 64 and 96


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_and_dense_give_the_same_lora_gradients(bundle: Path, checkpointing: bool) -> None:
    peft = pytest.importorskip("peft")
    tokens = torch.arange(24).view(2, 12) % 64

    results = []
    for held in (False, True):
        model = load_slm(bundle, packed=held, dtype=torch.float32)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
        model.train()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss, grads))

    (dense_loss, dense), (packed_loss, packed) = results
    torch.testing.assert_close(packed_loss, dense_loss, rtol=1e-5, atol=1e-6)
    assert len(dense) == 8
    for name, gradient in dense.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-6)


def test_loaded_weights_are_exactly_the_stored_ones(bundle: Path) -> None:
    weights = WeightFile(bundle)
    for held in (False, True):
        model = load_slm(bundle, packed=held, dtype=torch.float32)
        for name in weights:
            value = model.get_submodule(name.rpartition(".")[0]).weight
            np.testing.assert_array_equal(value.detach().numpy(), weights.dequantize(name))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i: i["tensors"]["model.norm.weight"].update(data=[0, 10**9]), "incomplete"),
        (lambda i: i["tensors"]["model.norm.weight"].update(data=[-4, 192]), "offset"),
        (lambda i: i["tensors"]["model.norm.weight"].update(dtype="object"), "dtype"),
        (lambda i: i["tensors"]["model.norm.weight"].update(kind="pickle"), "kind"),
        (lambda i: i["tensors"]["lm_head.weight"].update(of="nowhere"), "no such"),
        (lambda i: i["tensors"].pop("model.norm.weight"), "lacks"),
        (lambda i: i.update(data="../elsewhere"), "file name"),
        (lambda i: i.update(format=2), "format"),
    ],
)
def test_a_wrong_index_is_refused(bundle: Path, change, reason: str) -> None:
    path = bundle / "weights.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))

    with pytest.raises(WeightsError, match=reason):
        load_slm(bundle)
