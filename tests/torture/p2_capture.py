"""P2: whoever records every byte at the broker finds none of a thousand planted secrets.

Knows a recording proxy, a real broker, and an exchange of every kind of message between real
couriers, enrolment included. Does not know learning: what would be texts, labels, paths, codes and
settings in a round are planted strings here.

Each secret is looked for as it is, as UTF-16, in hexadecimal and in base64 at each of its three
offsets. That the recording is of the right traffic is shown by what must be in it: tenant, device,
kinds and task ids stand in the headers, in clear, and are found.
"""

import base64
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_sdk.config import EdgeConfig
from edge_sdk.errors import EnrolmentError
from edge_sdk.link.broker import find_mosquitto, start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.keys import CoordinatorKeys
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire import messages
from edge_sdk.wire.enrolment import root_key_hash, sign_bundle
from edge_sdk.wire.seal import Identity, PublicIdentity
from tests.recording_proxy import RecordingProxy
from tests.torture.result import Result, Scale, say

SECRETS = {Scale.SHORT: 200, Scale.FULL: 1_000}
TENANT, COORDINATOR = "home", "coordinator"
DEVICES = ("kitchen", "garden")
BULK = 200_000
"""Bytes of filler around secrets in files and codes, so that they span chunks."""
_WAIT_S = 60.0
_LETTERS = "abcdefghijklmnopqrstuvwxyzäöüßéΩЖ你好"


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Plant, exchange, and search."""
    rng = random.Random(seed)
    secrets = [_secret(rng, n) for n in range(SECRETS[scale])]
    kind = "mosquitto" if find_mosquitto() else "amqtt"
    with start_broker(
        folder / "broker", users=dict.fromkeys((COORDINATOR, *DEVICES), "pw")
    ) as broker:
        recorder = RecordingProxy(int(broker.url_for(COORDINATOR).rpartition(":")[2]))
        try:
            sent = _exchange(secrets, rng, folder, broker.url_for, recorder.port)
        finally:
            recorder.close()
        seen = recorder.recording
    found = [secret for secret in secrets if any(form in seen for form in forms(secret))]
    control = [TENANT, *DEVICES, COORDINATOR, "AdapterUpdate", "OfferData", "Score", "task-0"]
    missing = [word for word in control if word.encode() not in seen]
    say("P2", f"{sent} messages, {len(seen):,} bytes recorded, {len(found)} secrets in them")
    return Result(
        "P2",
        "what the broker sees",
        len(found),
        f"of {len(secrets)} planted secrets in {len(seen):,} bytes",
        f"0 of {SECRETS[Scale.FULL]:,} planted secrets",
        not found and not missing and len(seen) > 10 * BULK,
        notes={"broker": kind, "messages": sent, "header fields not found": missing},
    )


def forms(secret: str) -> Iterator[bytes]:
    """Yield the encodings in which a secret may stand in traffic."""
    plain = secret.encode()
    yield from (
        plain,
        secret.encode("utf-16-le"),
        plain.hex().encode(),
        plain.hex().upper().encode(),
    )
    for shift in range(3):
        whole = base64.b64encode(bytes(shift) + plain)
        yield whole[4 if shift else 0 :].rstrip(b"=")[:-1]


def _secret(rng: random.Random, number: int) -> str:
    return f"{number}-" + "".join(rng.choices(_LETTERS, k=20))


# --- the exchange -----------------------------------------------------------------------------


def _exchange(
    secrets: list[str], rng: random.Random, folder: Path, url_for: Callable[[str], str], port: int
) -> int:
    """Every kind of message once per device at least, with all secrets in them; count messages."""
    root, ours = Identity.generate(), Identity.generate(hybrid=True)
    enrolled: dict[str, PublicIdentity] = {}

    def admit(message: messages.Enrol, public: PublicIdentity) -> None:
        if message.secret != b"s" * 16:
            raise EnrolmentError("not the secret of this device")
        enrolled[message.device] = public

    def courier(name: str, identity: Identity, **options: Any) -> Courier:
        host = url_for(name).rpartition(":")[0]
        link = MqttLink(f"{host}:{port}", client_id=name)
        box = Mailbox(folder / f"{name}-{secrets[0]}.db")
        common: dict[str, Any] = {
            "tenant": TENANT,
            "me": name,
            "now": time.time,
            "rng": random.Random(1),
        }
        return Courier(link, box, identity, **common, **options)

    coordinator = courier(COORDINATOR, ours, lookup=enrolled.get, admit=admit)
    bundle = sign_bundle(
        root, ours.public, tenant=TENANT, version=1, expires_s=int(time.time()) + 600
    )
    devices = {}
    for number, name in enumerate(DEVICES):
        keys = CoordinatorKeys(TENANT, root_key_hash(root.public), now=time.time)
        identity = Identity.generate(hybrid=number == 1)
        devices[name] = (
            courier(name, identity, lookup=keys.lookup, keys=keys.receive),
            identity,
            keys,
        )
    sent = 0
    try:
        coordinator.start()
        coordinator.announce_keys(bundle)
        for number, (name, (device, identity, keys)) in enumerate(devices.items()):
            mine = secrets[number :: len(DEVICES)]
            _configure(folder / f"{name}.toml", mine[0])
            device.start()
            keys.wait(_WAIT_S)
            device.enrol(_enrol(name, identity), timeout_s=_WAIT_S)
            for task, message in enumerate(_down(mine, rng)):
                coordinator.send(name, message, task=f"task-{task}")
                sent += 1
            for task, message in enumerate(_up(mine, rng)):
                device.send(COORDINATOR, message, task=f"task-{task}")
                sent += 1
        everyone = [coordinator, *(device for device, _, _ in devices.values())]
        until = time.monotonic() + _WAIT_S
        while any(party.mailbox.pending() for party in everyone):
            if time.monotonic() > until:
                raise TimeoutError("the exchange did not end")
            with everyone[0].mail:
                everyone[0].mail.wait(0.05)
    finally:
        for party in (coordinator, *(device for device, _, _ in devices.values())):
            party.close()
            party.mailbox.close()
    return sent + len(DEVICES)  # and one Enrol each


def _configure(path: Path, secret: str) -> None:
    """Settings that hold a secret, read as a device reads them."""
    text = f'[device]\nid = "kitchen"\n# {secret}\n[data]\ntrain = "{secret}.jsonl"\n'
    path.write_text(text, encoding="utf-8")
    try:
        EdgeConfig.load(path)
    except Exception:  # keys may be missing; what counts is that the text was in our hands
        return


def _enrol(name: str, identity: Identity) -> messages.Enrol:
    public = identity.public
    return messages.Enrol("token-1", b"s" * 16, name, public.sign, public.receive, ("slm",), 512)


def _down(secrets: list[str], rng: random.Random) -> Iterator[messages.AnyMessage]:
    """What a coordinator says, the secrets in every place where text may stand."""
    part_of = [secrets[i::6] for i in range(6)]
    labels = [secret[:24] for secret in part_of[1]]
    yield messages.Score("t", "base", tuple(part_of[0]), tuple(labels))
    yield messages.TopLogits("t", 1, "slm", "base", tuple(part_of[0]), tuple(labels), 4)
    rows = "".join(part_of[0]).encode()
    yield messages.TeachAdapter(
        "t", 1, "slm", "base", rows, 8, 16.0, ("q_proj",), "codec", rows, 1, 1, 0.1, 0, 0,
        tuple(part_of[0]), tuple(labels), False, 0.9, False, rows[:32], rows, rows, rows, 4, rows,
        rows, rows,
    )  # fmt: skip
    yield messages.OfferData("t", 1, tuple(part_of[1]), tuple(labels), (1.0,) * len(labels))
    for secret in part_of[2][:10]:
        data = rng.randbytes(BULK // 4) + "".join(part_of[2]).encode() + rng.randbytes(BULK)
        yield messages.File("t", f"models/{secret}", data)
    metadata = {f"{n}.json": secret.encode() for n, secret in enumerate(part_of[3])}
    yield messages.OfferModel("t", "slm", "base", metadata, tuple(part_of[3]))
    prompt, other = (f"Request: {{text}} {secret}" for secret in part_of[4][:2])
    names, words = part_of[4][:256], part_of[5][:256]
    task = messages.TextTask("kinds", prompt, other, tuple(names), tuple(words))
    yield messages.Enrolled("kitchen", "".join(part_of[5]).encode(), task)


def _up(secrets: list[str], rng: random.Random) -> Iterator[messages.AnyMessage]:
    """What a device says."""
    text = "".join(secrets)
    stages = dict.fromkeys(secrets[:200], 1.0)
    codes = rng.randbytes(BULK) + text.encode() + rng.randbytes(BULK)
    yield messages.AdapterUpdate("t", 1, "base", "c", codes, 1, 1, 0.5, stages, 1.0)
    yield messages.Refused("t", text[:60_000])
    yield messages.WantFiles("t", tuple(secrets))
    yield messages.ModelReport("t", "base", 0.5, 1, 1.0, 1.0, stages)
    yield messages.Scores("t", (0.5,))
    rows = text.encode()
    yield messages.LogitRows("t", 1, "base", rows[:32], 1, rows, rows, rows, stages, 1.0)
