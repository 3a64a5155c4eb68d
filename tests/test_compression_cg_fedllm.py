"""CG-FedLLM's autoencoder: PCA is its floor, refinement never hurts, the codec can use it."""

import numpy as np
import pytest
import torch

from compression.basis import normalised
from compression.blocks import Layout
from compression.cg_fedllm import Refresh, TgapConfig, encoders, tgap
from compression.codec import Compressor


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def updates(count: int, *, curved: bool = False) -> list[dict[str, np.ndarray]]:
    """Blocks of 32 from a four-dimensional source, straight or bent, with a little noise."""
    rng = np.random.default_rng(0)
    straight, bend = rng.normal(size=(4, 32)), rng.normal(size=(4, 32))
    made = []
    for _ in range(count):
        tensors = {}
        for name in ("l.q.lora_A", "l.v.lora_A"):
            z = rng.normal(size=(64, 4))
            blocks = z @ straight + (np.abs(z) @ bend if curved else 0)
            blocks += 0.05 * rng.normal(size=blocks.shape)
            tensors[name] = blocks.reshape(8, 256).astype(np.float32)
        made.append(tensors)
    return made


def test_linear_autoencoder_keeps_the_pca_optimum() -> None:
    recorded = updates(10)
    layout = Layout.of(recorded[0], block=32)

    trained = tgap(
        recorded, layout, TgapConfig(width=4, steps=50), rng=torch.Generator().manual_seed(0)
    )["A"]

    blocks = np.concatenate([normalised(layout.pack(u), layout) for u in recorded[8:]])
    tail = np.square(np.linalg.svd(blocks, compute_uv=False)[4:]).sum() / blocks.size
    assert trained.loss <= trained.pca_loss
    assert trained.loss == pytest.approx(tail, rel=0.05)  # of unseen blocks


def test_shallow_autoencoder_learns_what_no_line_can() -> None:
    recorded = updates(20, curved=True)
    layout = Layout.of(recorded[0], block=32)
    config = TgapConfig(width=4, hidden=64, steps=300, lr=3e-3)

    trained = tgap(recorded, layout, config, rng=torch.Generator().manual_seed(0))["A"]

    assert trained.loss < 0.8 * trained.pca_loss


def test_refinement_that_does_not_help_is_dropped() -> None:
    recorded = updates(10)
    layout = Layout.of(recorded[0], block=32)
    config = TgapConfig(width=4, steps=20, lr=10.0)

    trained = tgap(recorded, layout, config, rng=torch.Generator().manual_seed(0))["A"]

    assert trained.loss == trained.pca_loss


def test_trained_encoders_serve_the_codec() -> None:
    recorded = updates(10)
    layout = Layout.of(recorded[0], block=32)
    config = TgapConfig(width=4, steps=20)

    made = encoders(recorded[:9], layout, config, rng=torch.Generator().manual_seed(0))
    codec = Compressor.fit(recorded[:9], layout=layout, encoders=made)

    encoded = codec.encode(recorded[9], bytes_target=500)
    plain = Compressor.deadzone(layout).encode(recorded[9], bytes_target=500)
    assert encoded.method == "learned"
    assert encoded.cosine > 1.2 * plain.cosine


def test_refresh_is_due_after_enough_fallbacks() -> None:
    refresh, update = Refresh(window=10, patience=3), updates(1)[0]
    for method in ("learned", "dead-zone", "learned", "dead-zone"):
        refresh.observe(update, method)

    assert not refresh.due
    refresh.observe(update, "dead-zone")
    assert refresh.due
    assert len(refresh.updates) == 5
