"""Compares a bundle's graph in ONNX Runtime with torch on the same int4 weights, on real text.

Knows how to run both and what disagreement is allowed. Does not know how the bundle was made.

The relative logit error is |z - z'| / |z| over all positions, where each row is first centred (a
constant added to a row changes no probability). The greedy agreement is the share of positions at
which both would emit the same next token, given the same text before it.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edge_sdk.errors import ExportError
from edge_sdk.wire.manifest import PROMPT_FILE
from exporters.lora_inputs import places

logger = logging.getLogger(__name__)

F32 = npt.NDArray[np.float32]

DEFAULT_TEXT = (
    "The harbour was quiet when the first boat came in. A woman on the quay counted the crates, "
    "wrote the number on a slate and asked what the weather had been like beyond the lighthouse.",
    "Which of these rivers flows north: the Nile, the Thames or the Danube? Answer in one word, "
    "then say in a sentence how you know.",
)
"""Text for a model exported without any of its own; written for this file."""

MODEL_FILE = "model.onnx"
"""The graph that agrees with torch: every position's logits, a slot for an adapter per linear."""
ANSWER_FILE = "answer.onnx"
"""The fastest: the logits after each text's last token, no slots."""
ADAPTED_FILE = "answer_adapted.onnx"
"""The logits after each text's last token, with slots."""

ROUNDING = 0.02
"""Relative difference of last rows' logits from those of the whole graph. With blocks above 32,
products of one row and several, and of 4 and 8 bits, differ in the last bit (3e-7), which 8-bit
activations may take to the next step: 0.008 over 24 texts on 12.5 M, 0.013 on one of them, 0.02 on
a model of noise. A row of another text differs by about 1."""

MAX_TOKENS = 128
"""Tokens per text: long enough to leave the first-token regime, short enough for the demo."""


SMALL_MODEL = 50_000_000
"""Parameters below which one torch thread is used: on a busy machine, threads that wait for each
other took 2.0 s for what one does in 0.1 s (3.3 M parameters, 2 cores, load 5)."""


@dataclass(frozen=True, slots=True)
class ParityLimits:
    """Disagreement above which an export stops."""

    logit_error: float = 0.02
    greedy_agreement: float = 0.95


@dataclass(frozen=True, slots=True)
class Parity:
    """Measured agreement over `tokens` positions."""

    logit_error: float
    greedy_agreement: float
    tokens: float

    def figures(self) -> dict[str, float]:
        """The figures by name, rounded for a manifest."""
        return {name: round(float(value), 6) for name, value in asdict(self).items()}


def check_parity(
    bundle_dir: Path, texts: Sequence[str] = (), *, limits: ParityLimits | None = None
) -> Parity:
    """Measure a bundle and return the figures.

    Raises:
        ExportError: over a limit; the message has the figures and the worst layer.
    """
    import torch

    from compression.errors import WeightsError
    from compression.int4_torch import load_slm

    limits = limits or ParityLimits()
    batches = tokenize(bundle_dir, texts or DEFAULT_TEXT)
    try:
        model = load_slm(bundle_dir, dtype=torch.float32)
    except WeightsError as exc:
        raise ExportError(f"torch cannot be built from the exported weights: {exc}") from exc
    session = open_session(bundle_dir)
    errors, norms, same, positions = 0.0, 0.0, 0, 0
    for ids in batches:
        with torch.inference_mode(), few_threads(model):
            ours = model(torch.from_numpy(ids)).logits[0].float().numpy()  # (T, vocab)
        theirs = session.run(["logits"], empty_cache_feed(bundle_dir, session, ids))[0][
            0
        ]  # (T, vocab)
        errors += float(np.square(_centred(theirs) - _centred(ours)).sum())
        norms += float(np.square(_centred(ours)).sum())
        same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        positions += ids.shape[1]
    parity = Parity((errors / max(norms, 1e-30)) ** 0.5, same / positions, positions)
    if not (
        parity.logit_error <= limits.logit_error
        and parity.greedy_agreement >= limits.greedy_agreement
    ):
        worst, error = worst_layer(bundle_dir, model, batches[0])
        raise ExportError(
            f"the exported graph disagrees with torch on the same int4 weights: logit error "
            f"{parity.logit_error:.4f} (limit {limits.logit_error}), same greedy token on "
            f"{parity.greedy_agreement:.1%} of {positions} steps (limit "
            f"{limits.greedy_agreement:.0%}); the worst layer is {worst} (error {error:.4f}); "
            "export with accuracy_level 1, or report this model"
        )
    check_answers(bundle_dir, session, batches)
    logger.info("parity: %s", parity)
    return parity


def check_answers(bundle_dir: Path, session: Any, batches: Sequence[npt.NDArray[np.int64]]) -> None:
    """Compare the bundle's quick graphs with the last position of `session`, that of model.onnx.

    Raises:
        ExportError: one is missing, or its logits differ by more than rounding.
    """
    feeds = [empty_cache_feed(bundle_dir, session, ids) for ids in batches]
    whole = np.concatenate([session.run(["logits"], feed)[0][:, -1] for feed in feeds])
    prompt = [PROMPT_FILE] if (bundle_dir / PROMPT_FILE).is_file() else []
    for name in (ANSWER_FILE, ADAPTED_FILE, *prompt):
        try:
            quick = open_session(bundle_dir, file=name)
        except Exception as exc:  # onnxruntime raises its own, unexported classes
            raise ExportError(f"{bundle_dir / name} cannot be loaded: {exc}") from exc
        last = [quick.run(["logits"], feed)[0] for feed in feeds]
        error = relative(_centred(np.concatenate([z[:, -1] for z in last])), _centred(whole))
        if any(z.shape[1] != 1 for z in last) or not error <= ROUNDING:
            raise ExportError(
                f"{name} gives other logits than model.onnx: relative error {error:.2e} over "
                f"{len(last)} texts, limit {ROUNDING:g}; export again, and report it if it stays"
            )


def tokenize(bundle_dir: Path, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    """Token ids (1, T) of each text, T between 1 and MAX_TOKENS and within the model's context.

    Raises:
        ExportError: the tokenizer makes no token of any text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundle_dir / "tokenizer.json"))
    rows = [tokenizer.encode(text).ids[:MAX_TOKENS] for text in texts]
    batches = [np.asarray([ids], dtype=np.int64) for ids in rows if ids]
    if not batches:
        raise ExportError("the parity text has no tokens; give text_for_parity that is not empty")
    return batches


def open_session(
    bundle_dir: Path, extra_outputs: Sequence[str] = (), *, file: str = MODEL_FILE
) -> Any:
    """An onnxruntime session of a bundle's graph, which may also return inner values by name."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2  # the demo's machine; parity does not depend on it
    options.log_severity_level = 3
    if not extra_outputs:
        return ort.InferenceSession(str(bundle_dir / file), options)
    graph = onnx.load(str(bundle_dir / file), load_external_data=False)
    for name in extra_outputs:
        graph.graph.output.append(onnx.ValueInfoProto(name=name))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle_dir.resolve())
    )
    return ort.InferenceSession(graph.SerializeToString(), options)


def empty_cache_feed(
    bundle_dir: Path, session: Any, ids: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """Inputs of a decoder graph for token ids (B, T) with nothing in the key-value cache."""
    config = json.loads((bundle_dir / "genai_config.json").read_text(encoding="utf-8"))
    size = int(config["model"]["decoder"]["head_size"])
    feed: dict[str, npt.NDArray[Any]] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((ids.shape[0], value.shape[1], 0, size), np.float32)
        elif value.name == "position_ids":
            feed["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).astype(
                np.int64
            )
    return feed


def worst_layer(bundle_dir: Path, model: Any, ids: npt.NDArray[np.int64]) -> tuple[str, float]:
    """The linear layer that adds most relative error to what it received, and its output's error.

    Compares each layer's output in the graph with the same layer's output in torch `model`.
    """
    import torch

    graph = onnx.load(str(bundle_dir / MODEL_FILE), load_external_data=False)
    linears = places(graph)
    seen: dict[str, tuple[F32, F32]] = {}
    hooks = []
    for name in linears:

        def keep(_: Any, given: Any, made: Any, name: str = name) -> None:
            seen[name] = (given[0][0].float().numpy(), made[0].float().numpy())

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        with torch.inference_mode():
            model(torch.from_numpy(ids))
    finally:
        for hook in hooks:
            hook.remove()
    names = list(dict.fromkeys(edge for at in linears.values() for edge in (at.x, at.y)))
    session = open_session(bundle_dir, names)
    values = dict(
        zip(names, session.run(names, empty_cache_feed(bundle_dir, session, ids)), strict=True)
    )
    added = {}
    for name, at in linears.items():
        given, made = seen[name]
        came = relative(values[at.x][0], given)
        left = relative(values[at.y][0][:, at.start : at.stop], made)
        added[name] = (left - came, left)
    worst = max(added, key=lambda name: added[name][0])
    return worst, added[worst][1]


def relative(actual: F32, expected: F32) -> float:
    """|actual - expected| / |expected|, in the Euclidean norm over all elements."""
    difference = float(np.linalg.norm(np.asarray(actual, np.float64).ravel() - expected.ravel()))
    return difference / max(float(np.linalg.norm(expected)), 1e-30)


@contextlib.contextmanager
def few_threads(model: Any) -> Iterator[None]:
    """Within this block torch works with one thread if `model` is small."""
    import torch

    before = torch.get_num_threads()
    if sum(value.numel() for value in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _centred(logits: F32) -> F32:
    centred: F32 = logits - logits.mean(axis=-1, keepdims=True)
    return centred
