"""The public texts as every model of a run sees them, and who teaches whom on which.

Knows the LLM, the families' twins and the bridges between them. Does not know rounds, messages or
which device said what when.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coordinator.bank import Teacher
from coordinator.families import Families
from coordinator.llm import Llm
from coordinator.peers import (
    Bridge,
    Peer,
    combined,
    fitted,
    joined_targets,
)
from edge_sdk.algorithms.alignment import Align, Targets
from edge_sdk.algorithms.logit_rows import LogitTable
from edge_sdk.algorithms.selection import bits_per_byte, dual_min_ce, surer
from edge_sdk.algorithms.vocabulary import NONE
from edge_sdk.train.teaching import Pairs, target_bytes

F32 = npt.NDArray[np.float32]
LLM = "llm"
"""The large model's name among the figures; no family may have it."""

Chosen = npt.NDArray[np.bool_]


class School:
    """All models of a run on its public texts, and the bridges between the LLM and each family."""

    def __init__(
        self,
        llm: Llm,
        fleet: Families,
        public: Pairs,
        held_out: Pairs,
        *,
        whole: bool,
        align: Align,
        cache: Path | None,
    ) -> None:
        readers = [llm.reader, *(family.twin.reader for family in fleet.all)]
        self.public = fitted(public, readers, whole=whole)
        unseen = fitted(held_out, readers, whole=whole)
        self.sizes = target_bytes(llm.reader, self.public, whole=whole)
        self.large = Peer(llm.adapter, llm.reader, self.public, unseen, whole=whole)
        self.small = {
            f.name: Peer(f.twin.adapter, f.twin.reader, self.public, unseen, whole=whole)
            for f in fleet.all
        }
        self.up = {n: Bridge(peer, self.large, align, cache) for n, peer in self.small.items()}
        self.down = {n: Bridge(self.large, peer, align, cache) for n, peer in self.small.items()}

    @property
    def digest(self) -> str:
        """Names the public texts and labels, for the registry."""
        return hashlib.sha256(json.dumps(self.public).encode()).hexdigest()[:16]

    def for_large(
        self, teachers: Mapping[str, Sequence[Teacher]]
    ) -> tuple[Targets, Chosen, dict[str, int]]:
        """Lines 4 and 5: targets, the texts of S~_0, and how many of them each device teaches."""
        everyone = [(name, one) for name in sorted(teachers) for one in teachers[name]]
        own = bits_per_byte(self.large.losses(), self.sizes)
        bits = [bits_per_byte(t.table.losses(), self.sizes) / t.weight for _, t in everyone]
        best = dual_min_ce(own, np.stack(bits) if bits else np.zeros((0, len(own)), np.float32))
        parts, start = [], 0
        for name in sorted(teachers):
            end = start + len(teachers[name])
            mine = (best >= start) & (best < end)
            if mine.any():
                said = combined(
                    [t.table for t in teachers[name]], np.where(mine, best - start, NONE)
                )
                parts.append((mine, self.up[name].carry(said)))
            start = end
        taught = {t.device: int((best == i).sum()) for i, (_, t) in enumerate(everyone)}
        return joined_targets(self.large.places, parts), best != NONE, taught

    def for_small(self, name: str, said: LogitTable) -> tuple[Targets, Chosen]:
        """Line 8: the LLM's rows in the family's tokens, and the texts it is the better one on."""
        chosen = surer(self.small[name].losses(), said.losses(), self.sizes)
        return self.down[name].carry(said), chosen

    def held_out_bits(self, fleet: Families) -> dict[str, float | None]:
        """Bits per byte of the held-out texts, of the LLM and of each family's global factors."""
        figures = {LLM: self.large.held_out_bits()}
        for family in fleet.all:
            family.twin.adapter.load(family.twin.factors)
            figures[family.name] = self.small[family.name].held_out_bits()
        return figures
