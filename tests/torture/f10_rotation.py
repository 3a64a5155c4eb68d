"""F10: keys are replaced again and again under load; nothing is lost, old keys open nothing.

Knows the tenant without models. At every turn the epoch key of the coordinator is replaced, in turn
with a grace of a fraction of a second and with none, so that transfers under way are refused and
sealed anew; and one device replaces its receive keys, sometimes its identity key as well. Messages
sealed for the key before are held back until its grace is over and then offered as they are: each
must be refused with WRONG_KEY, and none of the deleted private halves may be left in any file of
the coordinator.
"""

import base64
import logging
import threading
import time
from pathlib import Path

from edge_sdk.link.broker import find_mosquitto, start_broker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.link.passwords import COORDINATOR
from edge_sdk.wire.messages import Enrol
from edge_sdk.wire.seal import Identity, new_stream, seal
from edge_sdk.wire.transfer import Offer, Refusal, Reject, decode_frame, encode_frame
from tests.torture.keys_world import Device, Tenant, mqtt, until
from tests.torture.result import Result, Scale, say

GRACE_S = 0.4


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Rotate under load; see the module's text."""
    turns, size = (20, 200_000) if scale is Scale.FULL else (4, 100_000)
    every_s = 1.5 if scale is Scale.FULL else 0.8
    names = [f"device-{i}" for i in range(4)]
    users = {name: f"{name}-{seed}" for name in [COORDINATOR, "spy", *names]}
    kind = "mosquitto" if find_mosquitto() else "amqtt"
    with start_broker(folder / "broker", users=users) as broker:
        tenant = Tenant(folder / "cloud", mqtt(broker, COORDINATOR)).start()
        devices = [Device(folder / name, mqtt(broker, name)) for name in names]
        for name, device in zip(names, devices, strict=True):
            device.enrol(tenant.code(name))
        sealed_anew = _Resealed()
        logging.getLogger("edge_sdk.link.receiving").addHandler(sealed_anew)
        load = _Load(names, devices, size)
        load.start()
        deleted, probes = [], []
        spy = _Spy(tenant, mqtt(broker, "spy"))
        for turn in range(turns):
            old = Identity.from_bytes(tenant.desk.identity.to_bytes())
            probes.append(spy.sealed_for(old, turn))
            tenant.warden.rotate(grace_s=GRACE_S if turn % 2 else 0.0)
            tenant.desk.ring.tidy(time.time())
            device = devices[turn % 4]
            assert device.courier is not None
            device.member.renew(device.courier, identity=turn % 3 == 2)
            time.sleep(every_s)
            tenant.desk.ring.tidy(time.time())
            deleted.append(old)
            if turn % 5 == 4:
                say("F10", f"{turn + 1} rotations, {len(load.sent)} messages sent")
        load.stop()
        until(lambda: not any(d.waiting() for d in devices), "the last messages", 60.0)
        time.sleep(GRACE_S)
        tenant.desk.ring.tidy(time.time())
        refused = sum(spy.refused(probe) for probe in probes)
        spy.close()
        set_aside = [
            f"{item.kind}: {item.parked}" for device in devices for item in device.mailbox.parked()
        ]
        parked = len(set_aside)
        for device in devices:
            device.close()
        left = _left_on_disk(folder / "cloud", deleted)
        tenant.close()
    logging.getLogger("edge_sdk.link.receiving").removeHandler(sealed_anew)
    counted = [item for item in tenant.counted if item[1].startswith("load-")]
    lost = len(load.sent - set(counted))
    doubled = len(counted) - len(set(counted))
    rings = [device.member.ring for device in devices]
    renewals = sum(1 for _, task in tenant.counted if task.startswith("renew-"))
    fine = (
        lost == 0
        and doubled == 0
        and parked == 0
        and refused == turns
        and left == 0
        and renewals == turns
        and all(ring.coming is None for ring in rings)
        and all(device.failure is None for device in devices)
        and len(load.sent) > turns
    )
    return Result(
        code="F10",
        title="key rotation under load",
        value={"rotations": turns, "messages": len(load.sent), "old_keys_refused": refused},
        unit="rotations",
        goal="20 rotations, 0 lost, old keys unusable after grace",
        passed=fine,
        lost=lost,
        doubled=doubled,
        notes={
            "broker": kind,
            "parked": set_aside,
            "device_renewals": renewals,
            "transfers_refused_and_sealed_anew": sealed_anew.count,
            "deleted_keys_found_on_disk": left,
            "grace_s": GRACE_S,
        },
    )


class _Load:
    """Devices that always have two messages waiting."""

    def __init__(self, names: list[str], devices: list[Device], size: int) -> None:
        self.sent: set[tuple[str, str]] = set()
        self._pairs, self._size = list(zip(names, devices, strict=True)), size
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        number = 0
        while not self._stop.wait(0.02):
            for name, device in self._pairs:
                if device.waiting() < 2:
                    number += 1
                    task = f"load-{number}"
                    device.say(task, self._size)
                    self.sent.add((name, task))


class _Resealed(logging.Handler):
    """Counts the transfers of devices that were refused because a key had changed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "of device-" in record.getMessage()


class _Spy:
    """Keeps what was sealed for an old key, and offers it when nobody should open it any more."""

    def __init__(self, tenant: Tenant, link: MqttLink) -> None:
        self._tenant, self._link = tenant, link
        self._me = Identity.generate()
        code = tenant.code("spy")
        public = self._me.public
        enrol = Enrol(code.token_id, code.secret, "spy", public.sign, public.receive, (), 0)
        tenant.desk.fleet.admit(enrol, public)
        self._answers: dict[bytes, int] = {}
        link.subscribe(f"v1/{tenant.name}/spy/down", self._hear)
        link.connect(wait_s=10.0)

    def sealed_for(self, old: Identity, turn: int) -> Offer:
        now_s, stream = int(time.time()), new_stream()
        sealed = seal(
            b"stolen",
            tenant=self._tenant.name,
            sender_id="spy",
            recipient_id=COORDINATOR,
            kind="Scores",
            task=f"spy-{turn}",
            stream=stream,
            sequence=turn + 1,
            created_s=now_s,
            expires_s=now_s + 3600,
            sender=self._me,
            recipient=old.public,
        )
        return Offer(stream, sealed.manifest)

    def refused(self, offer: Offer) -> bool:
        self._link.publish(f"v1/{self._tenant.name}/spy/up", encode_frame(offer))
        until(lambda: offer.stream in self._answers, "an answer to an old seal")
        return self._answers[offer.stream] == Refusal.WRONG_KEY

    def _hear(self, _topic: str, payload: bytes) -> None:
        if payload:
            frame = decode_frame(payload)
            self._answers[frame.stream] = frame.refusal if isinstance(frame, Reject) else 0

    def close(self) -> None:
        self._link.close()


def _left_on_disk(folder: Path, deleted: list[Identity]) -> int:
    """How many deleted receive keys are still in a file of the coordinator, in any spelling."""
    data = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for line in data.splitlines():
        try:
            data += base64.b64decode(line, validate=True)
        except ValueError:
            continue
    return sum(identity.receiving.private_bytes_raw() in data for identity in deleted)
