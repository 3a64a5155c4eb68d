"""CG-FedLLM's gradient autoencoder and its pre-training, in the form that works.

Source: Wu et al., "CG-FedLLM: How to Compress Gradients in Federated Fine-tuning for Large Language
Models" (arXiv 2405.13746): TGAP (temporal-ensemble gradient-aware pre-training) and FAF (federated
fine-tuning with the autoencoder).

    TGAP  record updates G of clients i over the first rounds t; train the autoencoder to
          minimise mean ||G - Dec(Enc(G))||^2 over all of them
    FAF   each round a client sends Enc(G), the server decodes and aggregates; the autoencoder is
          trained again (refreshed) when decoded updates show that it has aged

    paper          here
    G              a block of an update (the change of a factor), divided by its kind's RMS
    Enc, Dec       `encode`, `decode` of an autoencoder, one per kind of factor
    AE training    `tgap`
    FAF's refresh  `tgap` again, over `Refresh`'s latest rounds

Differences from the paper, each with its reason (an independent reproduction found that the
published network decodes to nothing that depends on its input):
- the change from the broadcast adapter is encoded, not the adapter: the latter is almost all shared
  initialisation, so its reconstruction error says nothing about the update
- per-kind RMS instead of none: without it the loss sees only the largest factors
- no Tanh: it clips half of RMS-normalised values
- PCA start: the best linear autoencoder in closed form; Adam only refines it, and the result is
  kept only where a held-out part says that it is better
- blocks instead of one picture of all factors: neighbouring rows of different layers have nothing
  in common for a convolution to find
- the rate is set by quantizing and range-coding the latents (`codec.py`), not by their number, and
  what is not sent is kept by error feedback
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from compression.basis import normalised
from compression.blocks import Layout, Tensors

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TgapConfig:
    """Hyper-parameters; the paper gives only Adam and its rate."""

    width: int = 16
    """Latents per block."""
    hidden: int = 0
    """Hidden units of the non-linear correction; 0 is the linear autoencoder."""
    steps: int = 200
    """Adam steps."""
    batch: int = 1024
    """Blocks per step."""
    lr: float = 2e-4
    """The paper's rate."""
    held_out: float = 0.2
    """Share of blocks, the latest, that decide whether the refinement is kept."""


class LinearAutoencoder(nn.Module):
    """z = x W, x^ = z W^T with orthonormal W (block, width); its optimum is PCA."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def basis(self) -> torch.Tensor:
        """The orthonormal factor of the weight, (block, width)."""
        q, r = torch.linalg.qr(self.weight)
        signs = torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
        return torch.mul(q, signs)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(N, block) -> (N, width)."""
        return x @ self.basis()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(N, width) -> (N, block)."""
        return z @ self.basis().T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.basis()
        return (x @ w) @ w.T


class ShallowAutoencoder(LinearAutoencoder):
    """The linear one plus a one-layer correction on either side; begins equal to it."""

    def __init__(self, start: torch.Tensor, hidden: int) -> None:
        super().__init__(start)
        block, width = start.shape
        self.encoder = nn.Sequential(
            nn.Linear(block, hidden), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )
        self.decoder = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, block, bias=False)
        )
        for part in (self.encoder, self.decoder):
            last = part[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(N, block) -> (N, width)."""
        return super().encode(x) + self.encoder(x)  # type: ignore[no-any-return]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(N, width) -> (N, block)."""
        return super().decode(z) + self.decoder(z)  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


@dataclass(frozen=True, slots=True)
class Trained:
    """One kind's autoencoder; losses are mean squared errors per value, on held-out blocks."""

    model: LinearAutoencoder
    pca_loss: float
    loss: float


def tgap(
    updates: Sequence[Tensors],
    layout: Layout,
    config: TgapConfig,
    *,
    rng: torch.Generator,
) -> dict[str, Trained]:
    """Pre-train one autoencoder per kind of factor on recorded updates, oldest first."""
    # step 1: record G over clients and the first rounds, as normalised blocks
    recorded = [normalised(layout.pack(update), layout) for update in updates]
    trained = {}
    for kind, rows in layout.kind_rows.items():
        blocks = torch.from_numpy(np.concatenate([part[rows] for part in recorded]))  # (N, block)
        cut = max(1, round(len(blocks) * (1 - config.held_out)))
        train, judge = blocks[:cut], blocks[cut:] if cut < len(blocks) else blocks
        trained[kind] = _train(train, judge, config, rng)
    return trained


def pca(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """The leading eigenvectors of the blocks' second moment, (block, width)."""
    _, vectors = torch.linalg.eigh(blocks.double().T @ blocks.double())  # ascending
    leading: torch.Tensor = vectors.flip(1)[:, :width].float()
    return leading


def complete(basis: torch.Tensor, blocks: torch.Tensor) -> F32:
    """Extend a basis (block, width) by the PCA of what it leaves out, to (block, block).

    The codec's default keeps every direction reachable, most telling first.
    """
    block, width = basis.shape
    rest = blocks.double() - (blocks.double() @ basis.double()) @ basis.double().T
    others = pca(rest, block - width).double() if width < block else basis[:, :0].double()
    full, r = torch.linalg.qr(torch.cat([basis.double(), others], dim=1))
    full = full * torch.where(torch.diagonal(r) < 0, -1.0, 1.0)
    return full.float().detach().numpy()  # type: ignore[no-any-return]


def encoders(
    updates: Sequence[Tensors], layout: Layout, config: TgapConfig, *, rng: torch.Generator
) -> dict[str, F32]:
    """What `Compressor.fit(..., encoders=)` takes: TGAP's linear encoders at full width."""
    trained = tgap(updates, layout, config, rng=rng)
    recorded = [normalised(layout.pack(update), layout) for update in updates]
    made = {}
    for kind, rows in layout.kind_rows.items():
        blocks = torch.from_numpy(np.concatenate([part[rows] for part in recorded]))
        with torch.no_grad():
            made[kind] = complete(trained[kind].model.basis(), blocks)
    return made


class Refresh:
    """FAF's memory: the latest decoded updates, and whether the autoencoder has aged.

    `patience` fallbacks to the plain quantizer among the last `window` codes call for a refresh.
    """

    def __init__(self, *, window: int = 32, patience: int = 8) -> None:
        self.updates: deque[Tensors] = deque(maxlen=window)
        self._fallbacks: deque[bool] = deque(maxlen=window)
        self._patience = patience

    def observe(self, decoded: Tensors, method: str) -> None:
        """Note a decoded update and the method its header names."""
        self.updates.append(decoded)
        self._fallbacks.append(method != "learned")

    @property
    def due(self) -> bool:
        """Whether the codec should be learned again from `updates`."""
        return sum(self._fallbacks) >= self._patience


def _train(
    train: torch.Tensor, judge: torch.Tensor, config: TgapConfig, rng: torch.Generator
) -> Trained:
    # step 2: PCA is the optimum of the linear model; start there
    start = pca(train, config.width)
    model = ShallowAutoencoder(start, config.hidden) if config.hidden else LinearAutoencoder(start)
    with torch.no_grad():
        pca_loss = _loss(model, judge).item()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # step 3: minimise mean ||G - Dec(Enc(G))||^2 by Adam
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    for _ in range(config.steps):
        chosen = torch.randint(len(train), (min(config.batch, len(train)),), generator=rng)
        optimizer.zero_grad()
        _loss(model, train[chosen]).backward()
        optimizer.step()
    # step 4: keep the refinement only if later updates are reconstructed better
    with torch.no_grad():
        loss = _loss(model, judge).item()
    if not loss <= pca_loss:
        model.load_state_dict(before)
        loss = pca_loss
    return Trained(model.eval(), pca_loss, loss)


def _loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x), x)
