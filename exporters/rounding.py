"""Rounds a matrix to int4 in blocks so that its output changes least: GPTQ on ONNX Runtime's grid.

Knows matrices and second moments of their inputs. Does not know models, graphs or files.

A block of one row becomes codes 0..15 and one scale: w ~ (code - 8) * scale, where the scale may
be negative, which gives the wider end of the grid (-8) to values of either sign. First each
block's scale is searched, then columns are rounded one after the other, the most used first, and
the columns still to come make up for each error.

Source: Frantar et al. 2022 (arXiv 2210.17323), Algorithm 1, with the scales chosen beforehand and
columns in descending order of C_jj, as the authors did later ("act-order, static groups").

Differences: a block's scale is not that of its largest value but the one of CLIPS that loses least,
each after a least-squares fit, where a column's loss counts by how badly later columns can make up
for it, 1 / U_jj^2.

In torch, whose threads can be limited: on a busy machine numpy's wait for each other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST, HIGHEST, ZERO = -8, 7, 8
"""The grid of 4 bits, and the code of 0."""
CLIPS = (0.8, 0.9, 1.0)
"""Shares of a block's largest value that become the end of the grid; values beyond are cut off."""
DAMPING = 0.1
"""Share of C's mean diagonal added to it before inversion. GPTQ has 0.01; with a thousand tokens a
tenth, which trusts C less, carries over better to other text."""
CHUNK = 64
"""Columns whose errors are gathered before the rest of the matrix learns of them."""
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Rounded:
    """codes: uint8 (out, blocks * block), 0..15, ZERO at the end; scales: float32 (out, blocks)."""

    codes: Tensor
    scales: Tensor

    def values(self, width: int) -> Tensor:
        """The matrix they stand for, float32 (out, width)."""
        out, blocks = self.scales.shape
        steps = (self.codes.float() - ZERO).reshape(out, blocks, -1)
        return (steps * self.scales[..., None]).reshape(out, -1)[:, :width]

    def packed(self) -> Tensor:
        """The codes as MatMulNBits stores them, two to a byte, low first: (out, bytes)."""
        return self.codes[:, ::2] | self.codes[:, 1::2] << 4


def compensated(W: Tensor, C: Tensor, block: int) -> Rounded:
    """W (out, in) rounded for inputs whose second moments are C (in, in), up to a factor; float32.

    Raises:
        torch.linalg.LinAlgError: C holds values that are no numbers.
    """
    out, width = W.shape
    H = C.double() / C.diagonal().mean().clamp_min(TINY)
    H.diagonal().add_(DAMPING)
    order = H.diagonal().argsort(descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H[order][:, order]))
    U = torch.linalg.cholesky(inverse, upper=True).float()
    weight = torch.empty(width)
    weight[order] = U.diagonal().square().reciprocal()
    scales = block_scales(W, weight, block)
    of_column = scales.repeat_interleave(block, 1)[:, :width]
    codes = torch.full((out, scales.shape[1] * block), ZERO, dtype=torch.uint8)
    steps = _walk(W.T[order], of_column.T[order], U)  # (in, out)
    codes[:, order] = (steps.T + ZERO).to(torch.uint8)
    return Rounded(codes, scales)


def block_scales(W: Tensor, weight: Tensor, block: int) -> Tensor:
    """The scale (out, blocks) of each block of W (out, in) that loses least by `weight` (in,).

    With eight bits of mantissa, so that who trains on the weights holds scales in two bytes.
    """
    out, width = W.shape
    short = -width % block
    V = torch.nn.functional.pad(W, (0, short)).reshape(out, -1, block)
    D = torch.nn.functional.pad(weight, (0, short)).reshape(1, -1, block)
    largest = V.gather(2, V.abs().argmax(2, keepdim=True))  # (out, blocks, 1)
    largest = torch.where(largest == 0, 1.0, largest)  # an empty block: any scale serves
    best, least = largest, torch.full_like(largest, float("inf"))
    for clip in CLIPS:
        for end in (LOWEST, -LOWEST):
            first = _on_grid(V, clip * largest / end)
            DQ = D * first
            scale = (DQ * V).sum(2, keepdim=True) / (DQ * first).sum(2, keepdim=True).clamp_min(
                TINY
            )
            scale = torch.where(scale == 0, clip * largest / end, scale)
            loss = ((V - _on_grid(V, scale) * scale).square_() * D).sum(2, keepdim=True)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best[..., 0].bfloat16().float().contiguous()


def lost(W: Tensor, kept: Tensor, C: Tensor) -> float:
    """|(W - kept) X|^2 over the inputs X that C was made of."""
    D = W - kept
    return float((D @ C).mul_(D).sum(dtype=torch.float64))


def _on_grid(V: Tensor, scale: Tensor) -> Tensor:
    return (V / scale).round_().clamp_(LOWEST, HIGHEST)


def _walk(W: Tensor, scale: Tensor, U: Tensor) -> Tensor:
    # Algorithm 1 with rows and columns exchanged, so that what is read together lies together.
    steps = torch.empty_like(W)
    for start in range(0, len(W), CHUNK):
        stop = min(start + CHUNK, len(W))
        V, errors = W[start:stop], torch.empty_like(W[start:stop])
        for j in range(stop - start):
            at = start + j
            steps[at] = _on_grid(V[j], scale[at])
            errors[j] = (V[j] - steps[at] * scale[at]) / U[at, at]
            V[j + 1 :].addr_(U[at, at + 1 : stop], errors[j], alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return steps
