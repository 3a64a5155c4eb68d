"""The way down: a new adapter as its difference from one that a device holds, bit-equal there.

Knows adapters as tensors that float16 carries exactly, their digests, and chains of coded
differences. Does not know devices, messages or who holds what.

With t the adapter that the coordinator made, h the one that all hold and e what is still owed:

    v  = t - h + e          what should be said
    c  = code(v)            by the dead-zone quantizer, within a byte allowance
    h' = float16(h + decode(c))
    e' = v - (h' - h)

The coordinator adopts h' itself, so everyone computes h' from h and c with the same operations on
float32, one per value: there is no sum whose order a machine could choose. (A learned codec decodes
by a matrix product, whose last bit differs between machines; so it has no place here.) Rounding to
float16 counts as error too, so h_T - h_0 = sum of (t - h) + e_0 - e_T, up to rounding in float32.

Each link names the digest of what it starts from. A holder of any version on the chain joins there;
a digest at the end says whether it arrived. Links that together weigh as much as a whole adapter
are forgotten: a device that far behind is better served by a whole one.

Source: error feedback in both directions, Tang et al. 2019 (DoubleSqueeze, arXiv 1905.05957),
algorithm 1; here the server's side is coded against the held version.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from compression import tensor_file
from compression.blocks import F32, Layout, Tensors
from compression.codec import Compressor
from compression.errors import CodecError

RATIO = 20.0
"""Times fewer bytes than float32; an adapter of rank 8 is then below 1 % of a bundle of int4."""

LEAST_BYTES = 512
"""No allowance is smaller: below this headers leave nothing for values."""

DIGEST_BYTES = 32

_LINK_OVERHEAD = DIGEST_BYTES + 16  # the base's digest and the message's own framing


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain: the digest it starts from, and the codes of the difference."""

    base: bytes
    codes: bytes

    @property
    def size(self) -> int:
        """Bytes it takes in a message."""
        return len(self.codes) + _LINK_OVERHEAD


def digest_of(tensors: Tensors) -> bytes:
    """SHA-256 of names, shapes and float16 values (32 bytes), whatever the order of names."""
    seen = hashlib.sha256()
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name], dtype="<f2")
        seen.update(json.dumps([name, value.shape], separators=(",", ":")).encode())
        seen.update(value.tobytes())
    return seen.digest()


def rounded(tensors: Tensors) -> dict[str, F32]:
    """The tensors as float16 carries them, float32.

    Raises:
        CodecError: a value is beyond float16 or not finite.
    """
    with np.errstate(over="ignore"):
        exact = {name: tensors[name].astype(np.float16) for name in sorted(tensors)}
    for name, value in exact.items():
        if not np.isfinite(value).all():
            raise CodecError(f"{name} holds values beyond float16; lower the learning rate")
    return {name: value.astype(np.float32) for name, value in exact.items()}


def applied(held: Tensors, codes: bytes) -> dict[str, F32]:
    """h' of h and c.

    Raises:
        CodecError: the codes are malformed, for another layout, or lead beyond float16.
    """
    change = Compressor.deadzone(Layout.of(held)).decode(codes)
    return rounded({name: held[name] + change[name] for name in held})


def reached(digest: bytes, links: Sequence[Link], held: Mapping[bytes, Tensors]) -> Tensors | None:
    """The adapter named `digest`, from the newest of the held ones (by digest) on the chain.

    None if none of them is on it: a whole copy is needed.

    Raises:
        CodecError: the codes are malformed, or lead elsewhere than the digests say.
    """
    if digest in held:
        return held[digest]
    ends = [*(link.base for link in links[1:]), digest]
    for start in reversed(range(len(links))):
        found = held.get(links[start].base)
        if found is None:
            continue
        for link, end in zip(links[start:], ends[start:], strict=True):
            found = applied(found, link.codes)
            if digest_of(found) != end:
                raise CodecError("a difference leads to another adapter than its digest says")
        return found
    return None


class Chain:
    """The coordinator's end: what all hold, what is owed, and the newest differences.

    `adopt` may be called several times before `open` sends the result out: each time the difference
    is coded anew from the last opened version, and what an earlier try left out is still owed.

    Attributes:
        tensors: the adapter adopted last; what devices hold once it is opened and has arrived.
        digest: of `tensors`.
    """

    def __init__(self, first: Tensors, *, ratio: float = RATIO) -> None:
        """`first` is exact in float16, for example drawn from a seed that everyone knows.

        Raises:
            CodecError: it is not, or a ratio below 2, which float16 itself reaches.
        """
        if not 2.0 <= ratio <= 1e6:
            raise CodecError(f"ratio {ratio} is not in 2..1000000; whole float16 adapters are at 2")
        self._ratio = float(ratio)
        self._base = self.tensors = rounded(first)
        self._base_digest = self.digest = digest_of(self._base)
        if not all(np.array_equal(first[name], value) for name, value in self._base.items()):
            raise CodecError("the first adapter is not exact in float16; round it")
        self._owed = {name: np.zeros_like(value) for name, value in self.tensors.items()}
        self._codes = b""
        self._links: list[Link] = []
        self._codec = Compressor.deadzone(Layout.of(self._base))

    @property
    def whole_bytes(self) -> int:
        """Bytes of a whole adapter, float16."""
        return self._codec.raw_bytes // 2

    @property
    def owed(self) -> dict[str, F32]:
        """What was meant and not said yet, by tensor name."""
        return {name: value.copy() for name, value in self._owed.items()}

    def adopt(self, target: Tensors) -> dict[str, F32]:
        """Take what the codes of `target` decode to as the adapter, and return it.

        Raises:
            CodecError: other tensors than the first's, values that are not finite, or beyond
                float16; nothing is changed then.
        """
        if set(target) != set(self._base):
            raise CodecError("the adapter's tensors differ from the first's")
        wanted = {k: target[k] - self._base[k] + self._owed[k] for k in self._base}
        if not any(value.any() for value in wanted.values()):
            self.tensors, self.digest, self._codes = self._base, self._base_digest, b""
            return self.tensors
        allowance = max(LEAST_BYTES, int(self._codec.raw_bytes / self._ratio))
        codes = self._codec.encode(wanted, bytes_target=allowance).data
        made = applied(self._base, codes)
        self._owed = {k: wanted[k] - (made[k] - self._base[k]) for k in wanted}
        self.tensors, self.digest, self._codes = made, digest_of(made), codes
        return made

    def open(self) -> bytes:
        """Make what was adopted the version that differences start from; return its codes."""
        if not self._codes:
            return b""
        codes = self._codes
        self._links.append(Link(self._base_digest, codes))
        self._base, self._base_digest, self._codes = self.tensors, self.digest, b""
        while sum(link.size for link in self._links) >= self.whole_bytes:
            del self._links[0]
        return codes

    def since(self, digest: bytes) -> tuple[Link, ...] | None:
        """The opened links from `digest` on; () if it is the newest, None if a whole one is less.

        What is adopted and not opened is no part of it (`ahead`).
        """
        if digest == self._base_digest:
            return ()
        for start, link in enumerate(self._links):
            if link.base == digest:
                return tuple(self._links[start:])
        return None

    def ahead(self, digest: bytes) -> tuple[Link, ...] | None:
        """As `since`, and on to what is adopted, opened or not.

        () if that is it: it was opened already, in a round that was taken back since. None also
        where these links weigh as much as the values in float32, which is how a release has them.
        """
        if digest == self.digest:
            return ()
        links = self.since(digest)
        if links is None or not self._codes:
            return links
        links += (Link(self._base_digest, self._codes),)
        return links if sum(link.size for link in links) < self._codec.raw_bytes else None

    def to_bytes(self) -> bytes:
        """All of it; equal chains give equal bytes."""
        tensors: dict[str, npt.NDArray[np.generic]] = {}
        for name in sorted(self._base):
            tensors[f"base.{name}"] = self._base[name].astype(np.float16)
            tensors[f"made.{name}"] = self.tensors[name].astype(np.float16)
            tensors[f"owed.{name}"] = self._owed[name]
        for number, codes in enumerate([self._codes, *(link.codes for link in self._links)]):
            tensors[f"codes.{number}"] = np.frombuffer(codes, np.uint8)
        bases = [link.base.hex() for link in self._links]
        record = json.dumps({"ratio": self._ratio, "bases": bases}, sort_keys=True)
        data: bytes = save(tensors, metadata={"chain": record})
        return data

    @classmethod
    def from_bytes(cls, data: bytes, *, ratio: float | None = None) -> "Chain":
        """What `to_bytes` wrote, with another `ratio` from now on if one is given.

        Raises:
            CodecError: the bytes are none.
        """
        tensors, metadata = tensor_file.read(data)
        try:
            record = json.loads(metadata["chain"])
            chain = cls(_part(tensors, "base."), ratio=ratio or record["ratio"])
            chain.tensors, chain._owed = _part(tensors, "made."), _part(tensors, "owed.")
            bases = [bytes.fromhex(base) for base in record["bases"]]
            codes = [tensors[f"codes.{number}"].tobytes() for number in range(len(bases) + 1)]
        except (KeyError, TypeError, ValueError) as exc:
            raise CodecError(f"not a chain of adapters: {exc}") from exc
        chain.digest, chain._codes = digest_of(chain.tensors), codes[0]
        chain._links = [Link(*pair) for pair in zip(bases, codes[1:], strict=True)]
        return chain


def _part(tensors: Mapping[str, npt.NDArray[np.generic]], prefix: str) -> dict[str, F32]:
    found = {n.removeprefix(prefix): tensors[n] for n in sorted(tensors) if n.startswith(prefix)}
    return {name: value.astype(np.float32) for name, value in found.items()}
