"""The codec as a communication hook of torch's DistributedDataParallel. Knows torch.distributed.

Does not know what is trained. In a program that trains with DDP already, two lines are new:

    state = CodedGradients(model.module, ratio=100)
    model.register_comm_hook(state, coded_allreduce)

Each rank encodes the gradients of a bucket together with what error feedback owes, all ranks
exchange the codes, and each decodes all of them in order of rank, so that parameters stay equal
bit for bit. Nothing is learned: gradients of any model get the dead-zone quantizer and range
coder.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from compression.blocks import Layout
from compression.codec import RATIO, Compressor
from compression.errors import CodecError


class CodedGradients:
    """What the hook keeps between steps: names of parameters, codecs of buckets, what is owed.

    Attributes:
        bytes_sent: by this rank so far, codes only.
        bytes_plain: what the same gradients take as float32.

    `ratio`: times fewer bytes than float32; 0 sends float32 as it is, for comparison. `group`: the
    process group of the DDP model, if not the default one.
    """

    def __init__(
        self, module: nn.Module, *, ratio: float = RATIO, group: dist.ProcessGroup | None = None
    ) -> None:
        self.ratio, self.group = ratio, group
        self.bytes_sent = self.bytes_plain = 0
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._owed: dict[str, torch.Tensor] = {}
        self._codecs: dict[tuple[str, ...], Compressor] = {}

    def names_of(self, parameters: Sequence[torch.Tensor]) -> tuple[str, ...]:
        """The names of a bucket's parameters.

        Raises:
            CodecError: one is not of the module that this state was made for.
        """
        try:
            return tuple(self._names[id(p)] for p in parameters)
        except KeyError as exc:
            raise CodecError(
                "a bucket holds a parameter of another module; make CodedGradients of the module "
                "that DistributedDataParallel wraps"
            ) from exc

    def codec_for(self, names: tuple[str, ...], shapes: Sequence[torch.Size]) -> Compressor:
        """The codec of one bucket; DDP deals buckets anew after its first step."""
        if names not in self._codecs:
            layout = Layout(names, tuple(tuple(shape) or (1,) for shape in shapes))
            self._codecs[names] = (
                Compressor.deadzone(layout, ratio=self.ratio)
                if self.ratio
                else Compressor.identity(layout)
            )
        return self._codecs[names]

    def encode(self, names: tuple[str, ...], grads: Sequence[torch.Tensor]) -> bytes:
        """Codes of the gradients and what is owed; what they leave out is owed from now on.

        Feedback is kept by parameter, not by bucket, since buckets change.

        Raises:
            CodecError: gradients that are not finite.
        """
        codec = self.codec_for(names, [g.shape for g in grads])
        owed = [
            g.detach().float() + self._owed.get(n, 0) for n, g in zip(names, grads, strict=True)
        ]
        wanted = {
            name: np.atleast_1d(value.cpu().numpy())
            for name, value in zip(names, owed, strict=True)
        }
        encoded = codec.encode(wanted)
        for name, value in zip(names, owed, strict=True):
            sent = torch.from_numpy(encoded.decoded[name]).reshape(value.shape)
            self._owed[name] = value - sent.to(value.device)
        self.bytes_sent += len(encoded.data)
        self.bytes_plain += codec.raw_bytes
        return encoded.data


def coded_allreduce(
    state: CodedGradients,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch's stubs leave it out
) -> torch.futures.Future[torch.Tensor]:
    """The mean of all ranks' decoded gradients, in the bucket's form (values,).

    Raises:
        CodecError: gradients that are not finite, or a rank sent codes of another layout.

    Source: torch.distributed's interface of DDP communication hooks.
    """
    names = state.names_of(bucket.parameters())
    grads = bucket.gradients()
    codec = state.codec_for(names, [g.shape for g in grads])
    total = {name: np.zeros(1, np.float64) for name in names}
    codes = _exchanged(state.encode(names, grads), state.group, bucket.buffer().device)
    for data in codes:
        for name, value in codec.decode(data).items():
            total[name] = total[name] + value
    for name, grad in zip(names, grads, strict=True):
        mean = torch.from_numpy(total[name] / len(codes)).reshape(grad.shape)
        grad.copy_(mean)  # a view of the buffer
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _exchanged(data: bytes, group: dist.ProcessGroup | None, device: torch.device) -> list[bytes]:
    """The codes of every rank, in order of rank; they differ in length, so lengths go first."""
    ranks = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device), group=group)
    most = max(int(size) for size in sizes)
    mine = torch.zeros(most, dtype=torch.uint8, device=device)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine, group=group)
    return [
        bytes(part[: int(size)].cpu().numpy()) for part, size in zip(gathered, sizes, strict=True)
    ]
