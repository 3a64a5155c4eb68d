"""CG-FedLLM's autoencoder as published: a convolutional network over the factors as an image.

Knows torch. Does not know rounds or devices; the caller gives it the arrays of the first rounds.

Wu et al., arXiv 2405.13746 v3, appendix, as rebuilt in PAPERS.md 3 (b): pad, 3 x 3 convolution,
six convolutions of stride 2 with 2 to 64 channels, three residual blocks; the decoder mirrors it
and ends in a 7 x 7 convolution and Tanh. The latent holds 1/64 of the numbers, as float16 here.
Kept as it is, faults included (Tanh clips; absolute state or delta is the caller's choice), because
it is what ours is compared with. Sending the network itself is counted by the benchmark.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from compression.baselines.method import F32

STRIDES = 6
"""Halvings of each side; sides are padded to a multiple of 2^6."""


class ResNet3(nn.Module):
    """Images (B, 1, H, W) to latents (B, 64, H/64, W/64) and back to values in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 2, 4, 8, 16, 32, 64]
        down: list[nn.Module] = [_convolved(1, 1, stride=1)]
        down += [_convolved(a, b, stride=2) for a, b in pairwise(widths)]
        self.encoder = nn.Sequential(*down, *[_Residual(64) for _ in range(3)])
        up: list[nn.Module] = [_Residual(64) for _ in range(3)]
        for a, b in pairwise(widths[::-1]):
            up += [
                nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.decoder = nn.Sequential(*up, nn.Conv2d(1, 1, 7, padding=3), nn.Tanh())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstruct images (B, 1, H, W)."""
        found: torch.Tensor = self.decoder(self.encoder(images))
        return found


class PublishedAutoencoder:
    """The trained network as a baseline: each array divided by its RMS, one latent a round.

    Attributes:
        bytes_of_network: what sending its parameters as float32 costs.
    """

    feedback = True
    name = "cg-fedllm resnet-3"

    def __init__(self, *, width: int = 256, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self._net, self._width = ResNet3(), width
        self.bytes_of_network = 4 * sum(p.numel() for p in self._net.parameters())

    def train(
        self, arrays: Sequence[F32], *, steps: int, batch: int = 8, lr: float = 2e-4, seed: int = 0
    ) -> list[float]:
        """Fit on arrays (size,) of the first rounds (TGAP); the loss of every step."""
        images = torch.cat([self._image(values)[0] for values in arrays])
        rng = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(self._net.parameters(), lr=lr)
        self._net.train()
        losses = []
        for _ in range(steps):
            rows = images[torch.randint(len(images), (batch,), generator=rng)]
            loss = (self._net(rows) - rows).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        self._net.eval()
        return losses

    def encode(self, values: F32, rng: np.random.Generator) -> bytes:
        """Four bytes of scale, then two bytes a latent."""
        image, scale = self._image(values)
        self._net.eval()
        with torch.inference_mode():
            latent = self._net.encoder(image)
        data: bytes = np.array([scale], "<f4").tobytes() + latent.numpy().astype("<f2").tobytes()
        return data

    def decode(self, data: bytes, size: int) -> F32:
        """As `Baseline.decode`."""
        scale = float(np.frombuffer(data[:4], "<f4")[0])
        height = self._height(size) >> STRIDES
        latent = np.frombuffer(data[4:], "<f2").astype(np.float32)
        shaped = torch.from_numpy(latent.reshape(1, 64, height, self._width >> STRIDES))
        with torch.inference_mode():
            image = self._net.decoder(shaped)
        return np.asarray(image.numpy().reshape(-1)[:size] * scale, np.float32)

    def _height(self, size: int) -> int:
        side = 1 << STRIDES
        return math.ceil(size / self._width / side) * side

    def _image(self, values: F32) -> tuple[torch.Tensor, float]:
        scale = float(np.sqrt(np.mean(np.square(values)))) or 1.0
        padded = np.zeros(self._height(values.size) * self._width, np.float32)
        padded[: values.size] = values / scale
        return torch.from_numpy(padded.reshape(1, 1, -1, self._width)), scale


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norms[0](self.first(_padded(x))))
        found: torch.Tensor = x + self.norms[1](self.second(_padded(inner)))
        return found


def _padded(x: torch.Tensor) -> torch.Tensor:
    # Reflection needs a side of two at least; a latent of one is padded with zeros.
    return nn.functional.pad(
        x, (1, 1, 1, 1), mode="reflect" if min(x.shape[2:]) > 1 else "constant"
    )


def _convolved(before: int, after: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1), nn.BatchNorm2d(after), nn.ReLU()
    )
