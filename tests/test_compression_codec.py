"""The codec's promises: exactness where it promises it, refusal of what it did not make."""

import struct
from pathlib import Path

import numpy as np
import pytest

from compression import tensor_file
from compression.blocks import Layout
from compression.codec import Compressor, FeedbackState
from compression.errors import CodecError
from compression.feedback import AHEAD
from compression.header import MAGIC

Update = dict[str, np.ndarray]


class Devices:
    """Devices whose updates share a six-dimensional subspace of every block, plus own noise."""

    def __init__(self, *, seed: int = 0, noise: float = 0.5, input_width: int = 200) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise, self.input_width = noise, input_width
        self.shared = {kind: self.rng.normal(size=(6, 64)) for kind in "AB"}

    def factor(self, kind: str, scale: float, rank: int = 8) -> np.ndarray:
        rows = -(-rank * self.input_width // 64)
        blocks = self.rng.normal(size=(rows, 6)) @ self.shared[kind]
        blocks += self.noise * self.rng.normal(size=blocks.shape)
        flat = scale * blocks.reshape(-1)[: rank * self.input_width]
        return flat.reshape(rank, self.input_width).astype(np.float32)

    def update(self) -> Update:
        tensors = {}
        for layer in range(3):
            for target in ("q_proj", "v_proj"):
                name = f"model.layers.{layer}.self_attn.{target}"
                tensors[f"{name}.lora_A"] = self.factor("A", 1e-3)
                tensors[f"{name}.lora_B"] = np.ascontiguousarray(self.factor("B", 1e-2).T)
        return tensors


@pytest.fixture(scope="module")
def learned() -> Compressor:
    devices = Devices()
    return Compressor.fit([devices.update() for _ in range(4)])


def held_out() -> Update:
    """An update of the devices that the codec learned from, which it has not seen."""
    devices = Devices()
    return [devices.update() for _ in range(5)][-1]


def cosine(a: Update, b: Update) -> float:
    x = np.concatenate([a[name].ravel() for name in sorted(a)]).astype(np.float64)
    y = np.concatenate([b[name].ravel() for name in sorted(a)]).astype(np.float64)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def squared_error(a: Update, b: Update) -> float:
    return sum(float(np.square(a[name].astype(np.float64) - b[name]).sum()) for name in a)


def codecs(learned: Compressor) -> list[Compressor]:
    return [Compressor.identity(learned.layout), Compressor.deadzone(learned.layout), learned]


# --- layout ---------------------------------------------------------------------------------------


def test_layout_packs_and_unpacks_every_kind_of_tensor() -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "l.q_proj.lora_B": rng.normal(size=(33, 4)).astype(np.float32),
        "l.q_proj.lora_A": rng.normal(size=(4, 70)).astype(np.float32),
        "score.weight": rng.normal(size=(3, 5)).astype(np.float32),
        "score.bias": rng.normal(size=(3,)).astype(np.float32),
    }
    layout = Layout.of(tensors, block=32)

    blocks = layout.pack(tensors)

    assert blocks.shape == (layout.rows, 32)
    assert layout.kinds == ("A", "B", "other")
    np.testing.assert_array_equal(blocks[layout.kind_rows["B"]].ravel()[:33], tensors[
        "l.q_proj.lora_B"][:, 0])  # fmt: skip
    for name, value in layout.unpack(blocks).items():
        np.testing.assert_array_equal(value, tensors[name])


def test_layout_does_not_depend_on_the_order_of_tensors() -> None:
    update = Devices().update()
    turned = dict(reversed(update.items()))

    assert Layout.of(update) == Layout.of(turned)
    assert Layout.of(update).hash == Layout.of(turned).hash
    assert Layout.of(update).hash != Layout.of(update, block=32).hash


# --- exactness ------------------------------------------------------------------------------------


def test_identity_is_bit_equal() -> None:
    update = Devices().update()
    next(iter(update.values()))[0, :3] = [-0.0, 1e-42, 3e38]
    codec = Compressor.identity(Layout.of(update))
    state = FeedbackState()

    encoded = codec.encode(update, state)

    decoded = codec.decode(encoded.data)
    assert encoded.method == "identity"
    assert encoded.cosine == 1.0
    assert state.empty
    for name, value in update.items():
        assert decoded[name].tobytes() == value.tobytes()
        assert encoded.decoded[name].tobytes() == value.tobytes()


def test_error_feedback_telescopes(learned: Compressor) -> None:
    """sum of decoded = sum of deltas + e_0 - e_T, through a store-and-load every round.

    To half a last place of float32 for each of a round's two roundings: of delta + e, and of what
    is left of it.
    """
    devices = Devices(seed=1)
    for codec in codecs(learned):
        state = FeedbackState()
        codec.encode(devices.update(), state)  # so that e_0 is not zero
        start = state.tensors(codec.layout)
        deltas = {name: np.zeros(value.shape) for name, value in start.items()}
        decoded = {name: np.zeros(value.shape) for name, value in start.items()}
        largest = 0.0
        for turn in range(6):
            update, owed = devices.update(), state.tensors(codec.layout)
            largest = max(largest, *(float(np.abs(update[n] + owed[n]).max()) for n in update))
            data = codec.encode(update, state, bytes_target=0 if turn % 2 else 30_000 * 4).data
            sent = codec.decode(data)
            state = FeedbackState.from_bytes(state.to_bytes())
            for name in update:
                deltas[name] += update[name]
                decoded[name] += sent[name]
        owed = state.tensors(codec.layout)

        for name in start:
            expected = deltas[name] + start[name] - owed[name]
            np.testing.assert_allclose(decoded[name], expected, rtol=0, atol=12 * 2**-24 * largest)


def test_a_device_starts_ahead_by_what_it_owes_but_not_by_more_than_its_steps() -> None:
    devices = Devices(seed=4)
    codec, state = Compressor.deadzone(Layout.of(devices.update())), FeedbackState()
    assert not any(value.any() for value in state.ahead(codec.layout).values())

    for turn in range(8):  # at so few bytes the debt outgrows the steps
        update = devices.update()
        codec.encode(update, state, bytes_target=16_000 if turn == 0 else 100)
        owed, ahead = state.tensors(codec.layout), state.ahead(codec.layout)
        step, debt, lead = (norm_of_tensors(part) for part in (update, owed, ahead))
        assert lead == pytest.approx(min(debt, AHEAD * step), rel=1e-5)
        for name, value in ahead.items():
            np.testing.assert_allclose(value, owed[name] * (lead / debt), rtol=1e-4)
        if turn in (0, 7):
            assert (debt < AHEAD * step) is (turn == 0)
    assert state.to_bytes() == FeedbackState.from_bytes(state.to_bytes()).to_bytes()

    state.owe(codec.layout.pack(devices.update()), codec.layout)  # nothing could be sent
    assert norm_of_tensors(state.ahead(codec.layout)) > 0


def norm_of_tensors(tensors: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(v, dtype=np.float64).sum() for v in tensors.values())))


def test_what_the_device_decodes_is_what_the_coordinator_decodes(learned: Compressor) -> None:
    update = held_out()
    for codec in codecs(learned):
        encoded = codec.encode(update)
        decoded = Compressor.from_bytes(codec.to_bytes()).decode(encoded.data)
        for name in update:
            np.testing.assert_array_equal(decoded[name], encoded.decoded[name])
        assert cosine(decoded, update) == pytest.approx(encoded.cosine, abs=1e-6)


def test_linear_autoencoder_at_full_width_reconstructs(learned: Compressor) -> None:
    blocks = learned.layout.pack(held_out())

    latents = learned.basis.encode(blocks, learned.layout)
    restored = learned.basis.decode(latents, learned.layout)

    np.testing.assert_allclose(restored, blocks, rtol=0, atol=2e-6 * np.abs(blocks).max())


@pytest.mark.parametrize("width", [4, 6, 16])
def test_linear_autoencoder_loses_the_pca_tail(width: int) -> None:
    """Eckart-Young: the loss on its own data is the energy of the discarded eigenvalues."""
    devices = Devices()
    updates = [devices.update() for _ in range(3)]
    codec = Compressor.fit(updates, width=width)
    layout, loss, tail = codec.layout, 0.0, 0.0

    from compression.basis import normalised

    packed = [normalised(layout.pack(update), layout) for update in updates]
    for blocks in packed:
        restored = codec.basis.decode(codec.basis.encode(blocks, layout), layout)
        loss += float(np.square(blocks - restored, dtype=np.float64).sum())
    for rows in layout.kind_rows.values():
        stacked = np.concatenate([blocks[rows] for blocks in packed]).astype(np.float64)
        tail += float(np.square(np.linalg.svd(stacked, compute_uv=False)[width:]).sum())

    assert loss == pytest.approx(tail, rel=0.01)


def test_encoding_is_deterministic(learned: Compressor) -> None:
    update = held_out()
    assert learned.encode(update).data == learned.encode(update).data
    again = Devices()
    assert Compressor.fit([again.update() for _ in range(4)]).codec_id == learned.codec_id


# --- fidelity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [4000, 1000, 400, 200])
def test_learned_beats_dead_zone_at_equal_bytes_on_related_updates(
    learned: Compressor, target: int
) -> None:
    update = held_out()

    ours = learned.encode(update, bytes_target=target)
    plain = Compressor.deadzone(learned.layout).encode(update, bytes_target=target)

    assert len(ours.data) <= target
    assert len(plain.data) <= target
    assert ours.method == "learned"
    assert ours.cosine > 1.02 * plain.cosine


@pytest.mark.parametrize("target", [4000, 1000, 400])
def test_learned_is_not_worse_than_dead_zone_on_unrelated_updates(
    learned: Compressor, target: int
) -> None:
    """An aged codec costs at most its header: the gate falls back and says so."""
    rng = np.random.default_rng(9)
    update = {n: rng.laplace(size=s).astype(np.float32) for n, s in zip(
        learned.layout.names, learned.layout.shapes, strict=True)}  # fmt: skip

    ours = learned.encode(update, bytes_target=target)
    plain = Compressor.deadzone(learned.layout).encode(update, bytes_target=target)

    assert ours.method == "dead-zone"
    assert ours.cosine >= 0.98 * plain.cosine
    assert learned.decode(ours.data).keys() == update.keys()


def test_learning_from_decoded_codes_is_enough(learned: Compressor) -> None:
    """The coordinator never sees a true update, so no uncompressed warm-up is needed."""
    devices, plain = Devices(), Compressor.deadzone(learned.layout, ratio=20)
    seen = [plain.decode(plain.encode(devices.update()).data) for _ in range(4)]

    codec = Compressor.fit(seen)

    ours = codec.encode(held_out(), bytes_target=1000)
    assert ours.method == "learned"
    assert ours.cosine > 0.95 * learned.encode(held_out(), bytes_target=1000).cosine


def test_a_broken_encoder_falls_back(learned: Compressor) -> None:
    """The gate measures the decode; it does not believe the encoder it was given."""

    class Broken:
        def run(self, names, feeds):
            return [feeds["blocks"][::-1]]

    update = held_out()

    encoded = learned.encode(update, bytes_target=1000, session=Broken())

    assert encoded.method == "dead-zone"
    assert encoded.cosine > 0.3


def test_another_devices_decode_is_worse(learned: Compressor) -> None:
    devices = Devices(seed=0)
    updates = [devices.update() for _ in range(3)]
    decoded = [learned.encode(update, bytes_target=1000).decoded for update in updates]

    for i, update in enumerate(updates):
        own, other = decoded[i], decoded[(i + 1) % 3]
        assert squared_error(update, own) < 0.5 * squared_error(update, other)
        assert cosine(update, own) > 0.5 > abs(cosine(update, other)) + 0.4


def test_codec_beats_int8_and_zlib_by_far(learned: Compressor) -> None:
    import zlib

    update = held_out()
    bytes_int8 = 0
    for value in update.values():
        scale = np.abs(value).max() / 127
        bytes_int8 += len(zlib.compress(np.rint(value / scale).astype(np.int8).tobytes(), 9))

    encoded = learned.encode(update)

    assert bytes_int8 > 10 * len(encoded.data)
    assert encoded.cosine > 0.95


def test_error_feedback_delivers_what_one_code_cannot(learned: Compressor) -> None:
    """A constant update sent at 300 bytes a round arrives in full direction after some rounds."""
    update, state = Devices(seed=5).update(), FeedbackState()
    total = {name: np.zeros_like(value) for name, value in update.items()}
    seen = []
    for _ in range(40):
        decoded = learned.encode(update, state, bytes_target=300).decoded
        for name in total:
            total[name] += decoded[name]
        seen.append(cosine(total, update))

    assert seen[-1] > 0.85
    assert seen[-1] > seen[9] > seen[0]


def test_zero_update_costs_a_header_and_decodes_to_zero(learned: Compressor) -> None:
    zero = {name: np.zeros_like(value) for name, value in Devices().update().items()}
    for codec in codecs(learned)[1:]:
        encoded = codec.encode(zero)
        assert len(encoded.data) < 64
        assert encoded.cosine == 1.0
        assert not any(value.any() for value in codec.decode(encoded.data).values())


# --- refusals -------------------------------------------------------------------------------------


def test_mutated_codes_are_refused(learned: Compressor) -> None:
    update = held_out()
    rng = np.random.default_rng(7)
    for codec in codecs(learned):
        data = codec.encode(update).data
        for _ in range(150):
            broken = bytearray(data)
            choice = rng.integers(4)
            if choice == 0:
                broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
            elif choice == 1:
                del broken[rng.integers(len(broken)) :]
            elif choice == 2:
                broken += rng.bytes(rng.integers(1, 9))
            else:
                at = rng.integers(len(broken))
                broken[at:at] = rng.bytes(4)
            with pytest.raises(CodecError):
                codec.decode(bytes(broken))


def test_forged_codes_with_a_good_checksum_give_an_error_or_finite_values(
    learned: Compressor,
) -> None:
    """Whoever can seal a message can also compute a checksum; nothing else may go wrong."""
    import zlib

    rng = np.random.default_rng(8)
    data = learned.encode(held_out()).data
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(22, len(broken))] = rng.integers(256)
        crc = zlib.crc32(bytes(broken[22:]), zlib.crc32(bytes(broken[:18])))
        broken[18:22] = struct.pack("<I", crc)
        try:
            decoded = learned.decode(bytes(broken))
        except CodecError:
            refused += 1
        else:
            assert all(np.isfinite(value).all() for value in decoded.values())
    assert refused > 0


def test_oversized_codes_are_refused_before_they_are_read(learned: Compressor) -> None:
    huge = MAGIC + bytes(learned.max_bytes)
    with pytest.raises(CodecError, match="at most"):
        learned.decode(huge)


def test_foreign_codes_are_refused(learned: Compressor) -> None:
    other = Devices(input_width=128)
    foreign = Compressor.fit([other.update()])
    data = foreign.encode(other.update()).data

    for codec in codecs(learned):
        with pytest.raises(CodecError, match="another"):
            codec.decode(data)
    with pytest.raises(CodecError, match="another"):
        learned.decode(Compressor.deadzone(learned.layout).encode(Devices().update()).data)


def test_bad_updates_are_refused_and_leave_the_feedback_alone(learned: Compressor) -> None:
    update, state = Devices().update(), FeedbackState()
    learned.encode(update, state)
    before = state.to_bytes()
    first = next(iter(update))

    with pytest.raises(CodecError, match="finite"):
        learned.encode(update | {first: np.full_like(update[first], np.nan)}, state)
    with pytest.raises(CodecError, match="shape"):
        learned.encode(update | {first: update[first][:, 1:]}, state)
    with pytest.raises(CodecError, match="differ"):
        learned.encode(update | {"extra": update[first]}, state)
    with pytest.raises(CodecError, match="too low"):
        learned.encode(update, state, bytes_target=20)
    assert state.to_bytes() == before


def test_feedback_of_another_adapter_is_refused(learned: Compressor) -> None:
    other, state = Devices(input_width=128), FeedbackState()
    Compressor.fit([other.update()]).encode(other.update(), state)
    with pytest.raises(CodecError, match="other shapes"):
        learned.encode(Devices().update(), state)
    with pytest.raises(CodecError, match="not a feedback"):
        FeedbackState.from_bytes(state.to_bytes()[:50])


# --- files ----------------------------------------------------------------------------------------


def test_codecs_survive_a_round_trip(learned: Compressor, tmp_path: Path) -> None:
    update = held_out()
    for i, codec in enumerate(codecs(learned)):
        codec.save_pretrained(tmp_path / str(i))
        again = Compressor.from_pretrained(tmp_path / str(i))

        assert again.codec_id == codec.codec_id
        assert again.encode(update).data == codec.encode(update).data
    assert len({codec.codec_id for codec in codecs(learned)}) == 3


def test_damaged_codec_files_are_refused(learned: Compressor, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    data = learned.to_bytes()
    head = int.from_bytes(data[:8], "little")
    for _ in range(200):
        broken = bytearray(data)
        broken[rng.integers(head + 8)] ^= 1 << rng.integers(8)
        try:
            codec = Compressor.from_bytes(bytes(broken))
        except CodecError:
            continue
        assert codec.codec_id != learned.codec_id  # another valid codec, under another name
    for cut in (0, 7, 100, len(data) - 1):
        with pytest.raises(CodecError):
            Compressor.from_bytes(data[:cut])
    with pytest.raises(CodecError, match="cannot be read"):
        Compressor.from_pretrained(tmp_path)


def test_an_encoder_that_is_not_orthonormal_is_refused(learned: Compressor) -> None:
    from safetensors.numpy import load, save

    data = learned.to_bytes()
    tensors = load(data)
    tensors["encoder.A"] = (tensors["encoder.A"] * 1.5).astype(np.float16)
    meta = tensor_file.read(data)[1]["codec"]
    with pytest.raises(CodecError, match="orthonormal"):
        Compressor.from_bytes(save(tensors, metadata={"codec": meta}))


def test_onnx_encoder_agrees_with_numpy(learned: Compressor) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    graph = learned.encoder_onnx()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    update = held_out()
    blocks = learned.layout.pack(update)

    (latents,) = session.run(["latents"], {"blocks": blocks})
    encoded = learned.encode(update, bytes_target=1000, session=session)

    expected = learned.basis.encode(blocks, learned.layout)
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert encoded.method == "learned"
    assert encoded.cosine == pytest.approx(learned.encode(update, None, 1000).cosine, abs=1e-3)
    assert len(graph) < 4 * 2 * 64 * 64 + 2000
    with pytest.raises(CodecError, match="only a learned"):
        Compressor.deadzone(learned.layout).encoder_onnx()
