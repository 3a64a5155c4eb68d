"""What would leave this device, field by field, read from the real messages and not from a promise.

Knows the vocabulary's device half and what each field says. Does not know how messages travel, and
never shows a value; it only counts and names. What did leave is in `store/ledger.py`.
"""

from collections.abc import Iterable, Sequence
from typing import get_args

from msgspec import Struct, structs

from edge_sdk.store.ledger import Entry, field_sizes
from edge_sdk.store.mailbox import Posted
from edge_sdk.wire.messages import (
    AdapterUpdate,
    AnyMessage,
    Enrol,
    LogitRows,
    ModelReport,
    Refused,
    RenewKeys,
    Scores,
    VerifyDraft,
    WantFiles,
    decode,
)

DEVICE_KINDS = (
    Enrol,
    RenewKeys,
    WantFiles,
    ModelReport,
    AdapterUpdate,
    Scores,
    LogitRows,
    VerifyDraft,
    Refused,
)
"""Every message a device sends; there is no other way out of this process."""

MEANINGS = {
    "at": "how many tokens of the text the coordinator holds already",
    "accuracy": "share of this device's held-out texts that the model labels right",
    "codec_id": "name of the codec the change is encoded with",
    "codes": "the encoded change of the adapter's factors after training here",
    "cosine": "how much of the change the encoding kept",
    "countersignature": "signature of the statement by this device's next key",
    "csr": "request for a certificate for the broker: this device's name and a public key",
    "device": "this device's name, chosen by the operator",
    "draft": "tokens that this device's model guesses after the text (cloud drafts only)",
    "examples": "how many examples were used, as a number",
    "families": "model families this device accepts",
    "holds": "digest of the adapter, sent from there, that training began with",
    "hybrid_key": "public key for the second suite, where it is used",
    "identity_key": "public key that this device signs with",
    "ids": "the tokens this device's model finds likeliest at each place of public texts",
    "kept": "how many tokens a place, from the task",
    "lacks": "what of the coordinator's a refused task would need",
    "logps": "how likely it finds them, a little of what it was trained on included",
    "memory_mb": "memory allowed for training, from the settings",
    "paths": "names of model files this device lacks",
    "peak_mb": "most memory this process used",
    "places": "digest of the public texts' tokens",
    "raw_bytes": "size of the change before encoding",
    "reads": "formats that this version of the software reads",
    "reason": "why a task was refused, in one sentence without texts or paths",
    "receive_key": "public key that messages to this device are sealed to",
    "release": "name of the model the figures are about",
    "round": "number of the round, from the task",
    "scores": "one number in [0, 1] per text that the coordinator sent",
    "seconds": "how long each stage took",
    "secret": "the one-time secret of the enrolment code",
    "signature": "signature of the statement by this device's present key",
    "statement": "this device's name and its next public keys",
    "task_id": "name of the task, from the coordinator",
    "temperature": "how an answer is sampled, from the request",
    "text": "the prompt and answer so far as token ids; only where cloud drafts are switched on",
    "token_id": "name of the enrolment code",
    "top_k": "how an answer is sampled, from the request",
    "top_p": "how an answer is sampled, from the request",
    "truth": "how likely it finds the token that really follows in the public texts",
    "tokenizer": "digest of this device's tokenizer",
    "tokens_per_s": "speed of the model on this device",
}
"""What each field says. A field that is not here must not be sent (tests/test_edge_leaving.py)."""

IN_CLEAR = {
    "topic": "tenant and this device's name",
    "header": "tenant, sender, recipient, key names, message kind, task name, transfer id, "
    "running number, time of sealing, expiry and size",
    "acknowledgements": "which parts of a message from the coordinator have arrived",
    "knock": "an empty message at each connection: this device is here",
}
"""What the broker, or whoever reads the traffic where it is not TLS, sees besides sealed bytes."""


class Leaving(Struct, frozen=True):
    """One field of one message: its bytes, who can open it, and under which key.

    state: "waiting" (in the outbox now), "parked" (set aside, not sent), "sent" (the last one of
    its kind in the ledger) or "possible" (none yet; bytes are 0). content: the field's type. key:
    hexadecimal id of the receive key it is or was sealed to, "" while unknown.
    """

    message: str
    field: str
    content: str
    bytes: int
    to: str
    key: str
    state: str
    meaning: str = ""


def explain_all(
    items: Iterable[Posted], sent: Sequence[Entry], *, to: str, key: str
) -> list[Leaving]:
    """Return one row per field: of what is in the outbox, what last left, and what ever could.

    `key` names the receive key that `to` has now, under which what waits would be sealed.
    """
    rows: list[Leaving] = []
    seen: set[str] = set()
    for item in items:
        seen.add(item.kind)
        state = "parked" if item.parked else "waiting"
        sizes = field_sizes(decode(item.message))
        rows += _rows(item.kind, sizes, to=item.to, key=key, state=state)
    newest = {entry.kind: entry for entry in sent}
    for kind in DEVICE_KINDS:
        name = kind.__name__
        if name in seen:
            continue
        last = newest.get(name)
        if last is not None:
            rows += _rows(name, last.fields, to=last.to, key=last.key, state="sent")
        else:
            nothing = dict.fromkeys(_contents(name), 0)
            rows += _rows(name, nothing, to=to, key=key, state="possible")
    return rows


def _rows(kind: str, sizes: dict[str, int], *, to: str, key: str, state: str) -> list[Leaving]:
    content = _contents(kind)
    return [
        Leaving(kind, name, content.get(name, ""), size, to, key, state, MEANINGS.get(name, ""))
        for name, size in sizes.items()
    ]


def _contents(kind: str) -> dict[str, str]:
    known: dict[str, type[AnyMessage]] = {cls.__name__: cls for cls in DEVICE_KINDS}
    if kind not in known:
        return {}
    return {item.encode_name: _type_name(item.type) for item in structs.fields(known[kind])}


def _type_name(kind: object) -> str:
    plain = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    arguments = [a for a in get_args(plain) if a is not Ellipsis]
    name = getattr(plain, "__name__", str(plain))
    return f"{name} of {', '.join(_type_name(a) for a in arguments)}" if arguments else name
