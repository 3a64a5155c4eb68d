"""The closed vocabulary: every message two ends may exchange, and its bytes.

Knows shapes and limits of messages. Does not know encryption, chunks, sockets or storage.

A message is a frozen struct encoded as MessagePack. The vocabulary is small on purpose: a new
algorithm should be a new program over these words (DECISIONS.md lists why each word exists).
"""

import struct
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError

MAX_MESSAGE_BYTES = 512 * 1024 * 1024
"""Largest message either side builds or opens; a model file is the largest thing that travels."""

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Text = Annotated[str, Meta(max_length=65_536)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0, le=2**40)]
Word = Annotated[str, Meta(max_length=256)]
"""A label, a family, a layer or a codec's name."""
FilePath = Annotated[str, Meta(max_length=1024)]

# Numbers of items are bounded before any is read: eight million zeros are 8 MB on the wire and
# 400 MB as Python's floats.
Texts = Annotated[tuple[Text, ...], Meta(max_length=65_536)]
Words = Annotated[tuple[Word, ...], Meta(max_length=65_536)]
Units = Annotated[tuple[Unit, ...], Meta(max_length=65_536)]
Paths = Annotated[tuple[FilePath, ...], Meta(max_length=4096)]
Stages = Annotated[dict[Word, float], Meta(max_length=256)]
"""Seconds by stage of the work."""

TokenIds = Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=131_072)]
"""Tokens of a text, by their numbers in its tokenizer."""

HybridKey = Annotated[bytes, Meta(max_length=1216)]
"""A public ML-KEM-768 and X25519 key to seal to with suite 2; empty for none."""
Csr = Annotated[bytes, Meta(max_length=4096)]
"""A PKCS#10 request (DER) for a certificate that the broker believes; empty for none."""
Certificate = Annotated[bytes, Meta(max_length=16_384)]
"""A certificate and its authority (PEM); empty for none."""


Digest = Annotated[bytes, Meta(max_length=32)]
"""SHA-256 of something; empty for none."""
Abilities = Annotated[tuple[Word, ...], Meta(max_length=64)]
"""What a side reads or lacks, in words that the other may not know and then skips."""


class TextTask(Struct, frozen=True, forbid_unknown_fields=True):
    """A labelled-text task as prompts, so that any language model can do, learn and generate it.

    `prompt` holds `{text}`; the label's word (with its leading space) is what follows it.
    `generation_prompt` holds `{label}` (the label's word, stripped); a text follows it.
    `words[i]` is the verbaliser of `labels[i]`.
    """

    name: Name
    prompt: Text
    generation_prompt: Text
    labels: Annotated[tuple[Word, ...], Meta(min_length=2, max_length=256)]
    words: Annotated[tuple[Word, ...], Meta(min_length=2, max_length=256)]


class Message(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages; the tag on the wire is the class name."""


# --- tasks, coordinator -> device -------------------------------------------------------------


class AdapterDelta(Struct, frozen=True, forbid_unknown_fields=True):
    """One step from an adapter to the next: the digest of the former, and the coded difference."""

    base: Digest
    codes: bytes


class AdapterSource(Struct, frozen=True, forbid_unknown_fields=True):
    """How to make the files of an adapter release from what a device that trained holds.

    `digest` and `deltas` as in TrainAdapter, `seed` is its `adapter_seed`. The signed hashes say
    whether what was made are the release's files.
    """

    digest: Digest
    deltas: Annotated[tuple[AdapterDelta, ...], Meta(max_length=4096)]
    seed: Count
    rank: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Annotated[float, Meta(gt=0)]
    targets: Annotated[tuple[Word, ...], Meta(max_length=1024)]


# Fields with defaults below are left out where they hold them, so that a device of an earlier
# version reads what is meant for it.
class TrainAdapter(Message, frozen=True, omit_defaults=True):
    """Train LoRA on your own examples, starting from this adapter; reply AdapterUpdate.

    `adapter` is a safetensors blob of float16 factors (empty: the zero adapter drawn from
    `adapter_seed`). With a `digest` (`compression.downlink.digest_of`) the start is the adapter of
    that digest, however the device comes by it: as `adapter`, as one it holds or draws, or by
    `deltas` from one of these. `codec` is a codec file (`Compressor.to_bytes`), or empty when the
    device already holds the codec named `codec_id`. `bytes_target` is the allowance for the encoded
    update, 0 for none. `synthetic_weight` is mu of PAPERS.md 1.
    """

    task_id: Name
    round: Count
    family: Name
    release: Name
    adapter: bytes
    adapter_seed: Count
    rank: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Annotated[float, Meta(gt=0)]
    targets: Annotated[tuple[Word, ...], Meta(max_length=1024)]
    codec_id: Word
    codec: bytes
    steps: Count
    batch: Annotated[int, Meta(ge=1, le=4096)]
    lr: Annotated[float, Meta(gt=0, le=1)]
    synthetic_weight: Annotated[float, Meta(ge=0, le=10)]
    bytes_target: Count
    seed: Count
    digest: Digest = b""
    deltas: Annotated[tuple[AdapterDelta, ...], Meta(max_length=4096)] = ()


class Score(Message, frozen=True):
    """Say how well your model believes `labels[i]` fits `texts[i]`; reply Scores."""

    task_id: Name
    release: Name
    texts: Texts
    labels: Words


class TopLogits(Message, frozen=True):
    """Say what the adapter you trained in `round` finds likeliest on public texts; reply LogitRows.

    `labels[i]` belongs to `texts[i]`; the label's word is to be predicted, or with `whole` the text
    too. `kept` is k, the entries of a row.
    """

    task_id: Name
    round: Count
    family: Name
    release: Name
    texts: Texts
    labels: Words
    kept: Annotated[int, Meta(ge=1, le=128)]
    whole: bool = False


class TeachAdapter(Message, frozen=True):
    """Learn the labels of public texts, and what the LLM finds likeliest of those that it knows
    better than you, starting from this adapter; reply AdapterUpdate.

    `adapter` to `seed` are as in TrainAdapter. `share` is lambda, the weight of the labels; with
    `greedy` tokens are matched by where they begin, not by warping. The LLM's vocabulary is named
    by its digest `words_id`; `words` is its bytes (`Vocabulary.to_bytes`), or empty when the device
    already holds them. `tokens` (int32) are the LLM's tokens to be predicted, `lengths[i]` (int32)
    of them in text i; `truth`, `ids` and `logps` are its rows about them, as in LogitRows.
    """

    task_id: Name
    round: Count
    family: Name
    release: Name
    adapter: bytes
    rank: Annotated[int, Meta(ge=1, le=1024)]
    alpha: Annotated[float, Meta(gt=0)]
    targets: Annotated[tuple[Word, ...], Meta(max_length=1024)]
    codec_id: Word
    codec: bytes
    steps: Count
    batch: Annotated[int, Meta(ge=1, le=4096)]
    lr: Annotated[float, Meta(gt=0, le=1)]
    bytes_target: Count
    seed: Count
    texts: Texts
    labels: Words
    whole: bool
    share: Unit
    greedy: bool
    words_id: Annotated[bytes, Meta(min_length=32, max_length=32)]
    words: bytes
    tokens: bytes
    lengths: bytes
    kept: Annotated[int, Meta(ge=1, le=128)]
    truth: bytes
    ids: bytes
    logps: bytes


class OfferModel(Message, frozen=True, omit_defaults=True):
    """A release exists: fetch what you lack, verify, swap, measure; reply ModelReport.

    `metadata` holds the TUF metadata files by name; `targets` the TUF target paths of the release.
    With a `source` its files can be made instead of fetched, and the metadata may be in `packed`
    instead (`offers.py`).
    """

    task_id: Name
    family: Name
    release: Name
    metadata: Annotated[dict[FilePath, bytes], Meta(max_length=1024)]
    targets: Paths
    source: AdapterSource | None = None
    packed: bytes = b""


class OfferData(Message, frozen=True):
    """A versioned set of synthetic labelled texts, to be mixed in at the next epoch."""

    task_id: Name
    version: Count
    texts: Texts
    labels: Words
    weights: Units


# --- replies, device -> coordinator -----------------------------------------------------------


class AdapterUpdate(Message, frozen=True, omit_defaults=True):
    """The encoded change of the adapter. Carries no text, no label counts, no example.

    `holds` is the digest of the adapter that the training began with and that is still held here.
    """

    task_id: Name
    round: Count
    release: Name
    codec_id: Word
    codes: bytes
    examples: Count
    raw_bytes: Count
    cosine: Annotated[float, Meta(ge=-1.0, le=1.0)]
    seconds: Stages
    peak_mb: float
    holds: Digest = b""


class Scores(Message, frozen=True):
    """One number in [0, 1] per text of the Score task."""

    task_id: Name
    scores: Units


class LogitRows(Message, frozen=True):
    """The likeliest tokens at every place of the TopLogits task's texts; carries no example.

    `places` is the digest of the tokens to be predicted. `truth` are their log-probabilities
    (float32), `ids` (uint16, or uint32 of a vocabulary above 65,536) and `logps` (float16) those of
    the `kept` likeliest, row by row, all little-endian (`edge_sdk/algorithms/logit_rows.py`).
    """

    task_id: Name
    round: Count
    release: Name
    places: Annotated[bytes, Meta(min_length=32, max_length=32)]
    kept: Annotated[int, Meta(ge=1, le=128)]
    truth: bytes
    ids: bytes
    logps: bytes
    seconds: Stages
    peak_mb: float


class WantFiles(Message, frozen=True):
    """The device lacks these target files of an offered release; answered by File messages."""

    task_id: Name
    paths: Paths


class File(Message, frozen=True):
    """One target file of a release, or a part of one. Trusted only after TUF has checked its hash.

    `size` is that of the whole file where `data` are its bytes from `offset`; 0 where `data` are
    the file.
    """

    task_id: Name
    path: FilePath
    data: bytes
    offset: Count = 0
    size: Count = 0


class ModelReport(Message, frozen=True, omit_defaults=True):
    """How the model that now runs on this device does, on the device's own held-out text.

    `reads` are this version's formats (`compression/formats.py`), which change with its software.
    """

    task_id: Name
    release: Name
    accuracy: Unit
    examples: Count
    tokens_per_s: float
    peak_mb: float
    seconds: Stages
    reads: Abilities = ()


class Refused(Message, frozen=True, omit_defaults=True):
    """A task this device will not or cannot do, and why, in one sentence.

    `lacks` says what would help: "adapter", "codec" or "words", the LLM's vocabulary (send the task
    again with a whole one), or "allowance" (nothing does: what was learned is owed and comes with a
    later update).
    """

    task_id: Name
    reason: Text
    lacks: Abilities = ()


# --- speculation, device -> coordinator and back, at once or not at all --------------------------


class VerifyDraft(Message, frozen=True):
    """Say which of these guessed tokens your model takes after my text; reply Verified.

    `text` follows the `at` tokens that you hold of this task. The draft is greedy, so ids are all
    that is needed (PAPERS.md 4 f). `tokenizer` is the SHA-256 of tokenizer.json. `temperature`,
    `top_k` (0: off) and `top_p` standardise the model's distribution.
    """

    task_id: Name
    tokenizer: Annotated[bytes, Meta(min_length=32, max_length=32)]
    at: Count
    text: TokenIds
    draft: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=64)]
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    top_k: Count = 0
    top_p: Unit = 1.0


class Verified(Message, frozen=True):
    """The tokens that follow, 1 to g + 1, the first `accepted` of them as drafted.

    No token at all: the text is not held here any more; send it from its start. `pass_s` is what
    the pass took and `one_s` what one over a single token takes, in seconds.
    """

    task_id: Name
    tokens: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=65)]
    accepted: Count
    pass_s: Annotated[float, Meta(ge=0.0)]
    one_s: Annotated[float, Meta(ge=0.0)]


# --- enrolment --------------------------------------------------------------------------------


class Enrol(Message, frozen=True, omit_defaults=True):
    """A device's public keys together with the one-time secret that vouches for them.

    `reads` are the formats it knows (`compression/formats.py`); none said: those of version 1.
    """

    token_id: Name
    secret: bytes
    device: Name
    identity_key: bytes
    receive_key: bytes
    families: Annotated[tuple[Word, ...], Meta(max_length=256)]
    memory_mb: Count
    csr: Csr = b""
    hybrid_key: HybridKey = b""
    reads: Abilities = ()


class Enrolled(Message, frozen=True):
    """The coordinator's answer to a good Enrol: the trust root for releases and the task."""

    device: Name
    tuf_root: bytes
    task: TextTask
    certificate: Certificate = b""


class RenewKeys(Message, frozen=True):
    """New public keys of an enrolled device; reply Renewed.

    `statement` is a KeyStatement (see enrolment.py), `signature` that of the identity key known
    so far and `countersignature` that of the next one, which is often the same. `csr` asks for a
    new certificate for the broker.
    """

    task_id: Name
    statement: Annotated[bytes, Meta(max_length=4096)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]
    countersignature: Annotated[bytes, Meta(min_length=64, max_length=64)]
    csr: Csr = b""


class Renewed(Message, frozen=True):
    """The coordinator knows the device by its new keys from now on."""

    task_id: Name
    certificate: Certificate = b""


AnyMessage = (
    TrainAdapter
    | Score
    | TopLogits
    | TeachAdapter
    | OfferModel
    | OfferData
    | AdapterUpdate
    | Scores
    | LogitRows
    | WantFiles
    | File
    | ModelReport
    | Refused
    | VerifyDraft
    | Verified
    | Enrol
    | Enrolled
    | RenewKeys
    | Renewed
)

_BIN_32 = struct.Struct(">BI")  # MessagePack's longest byte string: its type, then its length
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Return the bytes of `message`.

    Raises:
        LocalProtocolError: larger than MAX_MESSAGE_BYTES.
    """
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(
            f"a {type(message).__name__} of {len(data)} bytes is over the limit of "
            f"{MAX_MESSAGE_BYTES}; send it in smaller parts"
        )
    return data


def file_head(file: File, data_bytes: int) -> bytes:
    """Return the bytes of `file` up to its data, of which `data_bytes` follow from elsewhere.

    So a part of a large file is sent without being read into a message first.
    """
    fields = {"type": "File", **msgspec.structs.asdict(file)}
    del fields["data"]
    whole = _encoder.encode({**fields, "data": b""})  # ends with an empty "bin 8"
    return whole[:-2] + _BIN_32.pack(0xC6, data_bytes)


def decode(data: bytes) -> AnyMessage:
    """Return the message that `data` encodes.

    Raises:
        RemoteProtocolError: not a message of this vocabulary, or a field out of its range.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(
            f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}"
        )
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(f"not a message of this protocol: {exc}") from exc
