"""The server's copy of one SLM family, on the very quantized weights its devices run.

Knows the bundle's model, the task, the global factors and the newest factors of each device. Does
not know where they came from or what is done with its scores.

One base model is held; a replica of a device is that base with the device's factors put in place.
CrossLM's feedback (PAPERS.md 1) so runs on the coordinator, with no text sent to any device. An
encoder's twin differs in its reader and model alone (`edge_sdk.train.kinds`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_sdk.errors import ConfigError
from edge_sdk.train.kinds import opened
from edge_sdk.train.lora import Adapter, Factors, Layout, LoraSpec, start_factors, wire_exact
from edge_sdk.train.text_task import TaskReader, label_probs
from edge_sdk.wire.messages import TextTask

F32 = npt.NDArray[np.float32]

LEAST_LEANING = 1e-3
"""A label that a replica as good as never gives is not blown up beyond 1/this."""


class Twin:
    """One family's model, its global factors and its replicas.

    Attributes:
        family: name of the SLM family.
        adapter: the LoRA layers in the model.
        factors: the global factors, exactly as float16 carries them to devices.
        replicas: device id -> newest factors decoded from that device.
        leanings: how often each replica gives each label on common texts, (replicas, labels); set
            by `calibrate`, None before.
        temperature: divides log-probabilities before they become scores; small models fine-tuned
            on much data are over-confident, and feedback needs probabilities.

    Raises:
        ConfigError: the temperature is not above 0, or the targets do not fit the model.
    """

    def __init__(
        self,
        family: str,
        model: Any,
        reader: TaskReader,
        spec: LoraSpec,
        *,
        seed: int,
        temperature: float = 1.0,
    ) -> None:
        if temperature <= 0:
            raise ConfigError(f"temperature {temperature} of twin {family} must be above 0")
        self.family, self.temperature, self.reader = family, temperature, reader
        self.adapter = Adapter(model, spec)
        self.factors: Factors = start_factors(self.adapter.layout, seed)
        self.replicas: dict[str, Factors] = {}
        self.leanings: F32 | None = None

    @classmethod
    def from_bundle(
        cls,
        family: str,
        bundle_dir: Path,
        task: TextTask,
        spec: LoraSpec,
        *,
        seed: int,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "Twin":
        """The twin of the release in `bundle_dir`, decoder or encoder, with its own weights.

        Raises:
            RuntimeFailure: the bundle's weights do not fit its configuration, or an encoder has no
                classifier or lacks a label of the task.
            ConfigError: the task does not fit the tokenizer, or the targets not the model.
        """
        model, reader = opened(bundle_dir, task, dtype=dtype)
        return cls(family, model, reader, spec, seed=seed, temperature=temperature)

    @property
    def spec(self) -> LoraSpec:
        """Rank, alpha and targets of the family's adapters."""
        return self.adapter.spec

    @property
    def layout(self) -> Layout:
        """Shape of every factor."""
        return self.adapter.layout

    def set_global(self, factors: Factors) -> None:
        """Replace the global factors by what float16 makes of `factors`.

        Raises:
            RemoteProtocolError: they are not for this family, or do not fit float16.
        """
        exact = wire_exact(factors)
        self.adapter.load(exact)
        self.factors = exact

    def restore(self, factors: Factors, replicas: Mapping[str, Factors]) -> None:
        """Take up global factors and replicas stored earlier."""
        self.set_global(factors)
        self.replicas = dict(sorted(replicas.items()))
        self.leanings = None

    def probs(self, texts: Sequence[str], factors: Factors | None = None) -> F32:
        """Probability of each label, (n, labels), by the global factors or by those given."""
        self.adapter.load(self.factors if factors is None else factors)
        result: F32 = label_probs(
            self.adapter.model, self.reader, texts, temperature=self.temperature
        ).numpy()
        return result

    def votes(self, texts: Sequence[str]) -> F32:
        """Label probabilities by replica, (replicas, n, labels); the global model's if none."""
        if not self.replicas:
            return self.probs(texts)[None]
        return np.stack(
            [self.probs(texts, factors) for _, factors in sorted(self.replicas.items())]
        )

    def calibrate(self, texts: Sequence[str]) -> F32:
        """Learn each replica's leaning on `texts` and return the jury's verdict on them.

        The texts should be alike for all replicas and touch all labels, as public ones are.
        """
        votes = self.votes(texts)
        self.leanings = votes.mean(axis=1)  # (replicas, labels)
        return verdict(votes, self.leanings)

    def jury(self, texts: Sequence[str]) -> F32:
        """The replicas' common label probabilities, (n, labels); their mean until calibrated."""
        return verdict(self.votes(texts), self.leanings)

    def accuracy(
        self, texts: Sequence[str], labels: Sequence[str], factors: Factors | None = None
    ) -> float:
        """Share of texts put under the right label, by the global factors or by those given."""
        wanted = np.array([self.reader.label_index(label) for label in labels])
        return float(np.mean(self.probs(texts, factors).argmax(axis=1) == wanted))


def verdict(votes: F32, leanings: F32 | None) -> F32:
    """One distribution a text, (n, labels), from votes (replicas, n, labels).

    A replica leans to the labels its device has, and knows little of the others. So each vote is
    first freed of its leaning (divided by it, times the leaning of all), and then counts, label by
    label, in proportion to how often its replica gives that label. Without leanings: the mean.

    Source: label shift, Saerens et al. 2002 (doi 10.1162/089976602753284446), with the
    leanings in place of the unseen label shares.
    """
    if leanings is None:
        return np.asarray(votes.mean(axis=0), dtype=np.float32)
    known = np.maximum(leanings, LEAST_LEANING)  # (replicas, labels)
    fair = votes * (known.mean(axis=0) / known)[:, None, :]
    fair /= fair.sum(axis=2, keepdims=True)
    mixed = (fair * (known / known.sum(axis=0))[:, None, :]).sum(axis=0)  # (n, labels)
    return np.asarray(mixed / mixed.sum(axis=1, keepdims=True), dtype=np.float32)
