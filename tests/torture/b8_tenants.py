"""B8: two tenants on one broker and in one database: nothing of one is allowed to the other.

Knows three matrices, each generated from what there is, so that a new word or method is in them
without anybody thinking of it:

- topics: every user of the broker x every topic of both tenants, published and subscribed to;
- messages: every kind of the vocabulary x who signs it x which tenant its header names x the topic
  it comes on, offered to the other tenant's coordinator and device, chunks and all;
- calls: every public method of Fleet that takes a device or a token, called for the other tenant's.

A topic of a device's own name in the other tenant passes a broker that carries both (its rules know
names, not keys); what arrives there is in the second matrix, and refused by its seal.
"""

import inspect
import itertools
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from coordinator.fleet import Fleet
from edge_sdk.errors import ConfigError, EnrolmentError, FleetError, LinkError, RemoteProtocolError
from edge_sdk.link.broker import start_broker
from edge_sdk.link.memory import MemoryBroker, MemoryLink
from edge_sdk.link.passwords import COORDINATOR, coordinator_of
from edge_sdk.wire.enrolment import EnrolmentCode
from edge_sdk.wire.messages import AnyMessage, encode
from edge_sdk.wire.seal import Identity, PublicIdentity, Sealed, new_stream, seal
from edge_sdk.wire.transfer import Chunk, Done, Offer, Want, decode_frame, encode_frame
from tests.test_wire_messages import SAMPLES
from tests.torture.keys_world import Device, Tenant, mqtt, until
from tests.torture.result import Result, Scale, say

HOME, OFFICE = "home", "office"
MEMBERS = {HOME: "kitchen", OFFICE: "desk"}


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Try everything; see the module's text."""
    topics, leaked = _topics(folder / "broker", seed)
    say("B8", f"{topics} topics tried, {len(leaked)} passed")
    messages, taken = _messages(folder / "messages")
    say("B8", f"{messages} messages forged, {len(taken)} taken")
    calls, allowed = _calls(folder / "calls")
    say("B8", f"{calls} calls made, {len(allowed)} allowed")
    return Result(
        code="B8",
        title="tenant isolation",
        value=len(leaked) + len(taken) + len(allowed),
        unit="allowed",
        goal="every API call and topic x wrong tenant: 0 allowed",
        passed=not leaked and not taken and not allowed and min(topics, messages, calls) > 0,
        notes={
            "topics": topics,
            "messages": messages,
            "calls": calls,
            "allowed": [*leaked, *taken, *allowed][:20],
            "kinds": len(get_args(AnyMessage)),
        },
    )


# --- topics -----------------------------------------------------------------------------------


def _topics(folder: Path, seed: int) -> tuple[int, list[str]]:
    """Who can write or read what belongs to others, on a broker that carries both tenants."""
    users = {name: f"{name}-{seed}" for name in [*MEMBERS.values(), "all"]}
    users |= {coordinator_of(tenant): f"{tenant}-{seed}" for tenant in MEMBERS}
    users[COORDINATOR] = "sees everything"
    every = [
        f"v1/{tenant}/{name}/{end}"
        for tenant in MEMBERS
        for name, end in [
            *itertools.product([*MEMBERS.values(), "all"], ("up", "down")),
            (COORDINATOR, "keys"),
        ]
    ]
    tried, leaked = 0, []
    with start_broker(folder, users=users, tenants=list(MEMBERS)) as broker:
        heard: dict[str, set[bytes]] = {}
        observer = mqtt(broker, COORDINATOR)
        observer.subscribe("v1/#", lambda t, p: heard.setdefault(t, set()).add(p))
        observer.connect(wait_s=10.0)
        readers: dict[str, dict[str, set[bytes]]] = {}
        links = {}
        for user in sorted(set(users) - {COORDINATOR}):
            links[user], readers[user] = mqtt(broker, user), {}
            links[user].connect(wait_s=10.0)
            mine = readers[user]
            for topic in every:
                links[user].subscribe(topic, lambda t, p, m=mine: m.setdefault(t, set()).add(p))
        for user, link in links.items():
            for topic in every:
                tried += 1
                link.publish(topic, f"by {user}".encode())
        for topic in every:
            observer.publish(topic, b"secret")
        observer.publish("v1/end/of/test", b"end")
        until(lambda: b"end" in heard.get("v1/end/of/test", ()), "the end of the topics")
        for user in links:  # what each may read has come when its own last word has
            own = _own(user)
            until(
                lambda u=user, o=own: all(b"secret" in readers[u].get(t, ()) for t in o["read"]),
                f"the topics of {user}",
            )
        for user, topic in itertools.product(links, every):
            tried += 1
            if f"by {user}".encode() in heard.get(topic, ()) and topic not in _own(user)["write"]:
                leaked.append(f"{user} wrote {topic}")
            if readers[user].get(topic) and topic not in _own(user)["read"]:
                leaked.append(f"{user} read {topic}")
        for link in [*links.values(), observer]:
            link.close()
    return tried, leaked


def _own(user: str) -> dict[str, set[str]]:
    """What the broker's rules give a user; for a device, under its name in either tenant."""
    public = {f"v1/{tenant}/{COORDINATOR}/keys" for tenant in MEMBERS}  # signed, and for everyone
    if user.startswith(COORDINATOR):
        tenant = user.partition(".")[2]
        names = [*MEMBERS.values(), "all"]
        both = {f"v1/{tenant}/{name}/{end}" for name in names for end in ("up", "down")}
        both.add(f"v1/{tenant}/{COORDINATOR}/keys")
        return {"write": both, "read": both | public}
    return {
        "write": {f"v1/{tenant}/{user}/up" for tenant in MEMBERS},
        "read": {f"v1/{tenant}/{user}/down" for tenant in MEMBERS} | public,
    }


# --- messages ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Forgery:
    kind: str
    signer: str
    header_tenant: str
    target: str

    def __str__(self) -> str:
        return f"{self.kind} by {self.signer} as {self.header_tenant} to {self.target}"


def _messages(folder: Path) -> tuple[int, list[str]]:
    """Messages of HOME and of strangers, offered to OFFICE's coordinator and device."""
    broker = MemoryBroker()
    tenants = {
        name: Tenant(folder / name, broker.link(name), name=name).start() for name in MEMBERS
    }
    devices = {}
    for tenant, name in MEMBERS.items():
        devices[tenant] = Device(folder / name, broker.link(name))
        devices[tenant].enrol(tenants[tenant].code(name))
    before = (len(tenants[OFFICE].counted), len(devices[OFFICE].read))
    post = _Post(broker)
    signers = {
        "home's device": (MEMBERS[HOME], devices[HOME].member.ring.identity),
        "home's device under the other's name": (
            MEMBERS[OFFICE],
            devices[HOME].member.ring.identity,
        ),
        "home's coordinator": (COORDINATOR, tenants[HOME].desk.identity),
        "a stranger": (MEMBERS[OFFICE], Identity.generate()),
    }
    targets: dict[str, tuple[str, str, PublicIdentity]] = {
        "coordinator": (COORDINATOR, "up", tenants[OFFICE].desk.identity.public),
        "device": (MEMBERS[OFFICE], "down", devices[OFFICE].member.ring.public),
    }
    tried, taken = 0, []
    for sample, signer, header_tenant, target in itertools.product(
        SAMPLES, signers, MEMBERS, targets
    ):
        sender, identity = signers[signer]
        recipient, end, key = targets[target]
        if target == "device" and signer != "a stranger":
            sender = COORDINATOR
        tried += 1
        forgery = _Forgery(type(sample).__name__, signer, header_tenant, target)
        topic_name = sender if end == "up" else recipient
        if topic_name == COORDINATOR:
            topic_name = MEMBERS[HOME]
        if post.offer(sample, sender, identity, header_tenant, recipient, key, topic_name, end):
            taken.append(str(forgery))
    post.wait_for_silence()
    taken += [str(done) for done in post.done]
    after = (len(tenants[OFFICE].counted), len(devices[OFFICE].read))
    if after != before:
        taken.append(f"{before} letters became {after}")
    taken += [f"a letter of {letter.sender}" for letter in tenants[OFFICE].desk.mailbox.unread()]
    for device in devices.values():
        device.close()
    for each in tenants.values():
        each.close()
    post.link.close()
    return tried, taken


class _Post:
    """Offers forgeries on OFFICE's topics, answers every Want, and notes every Done."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.link: MemoryLink = broker.link("post")
        self.done: list[str] = []
        self._sent: dict[bytes, tuple[str, str, Sealed]] = {}
        self._last = time.monotonic()
        self._lock = threading.Lock()
        for end in ("up", "down"):
            self.link.subscribe(f"v1/{OFFICE}/+/{end}", self._hear)
        self.link.connect()

    def offer(
        self,
        sample: AnyMessage,
        sender: str,
        identity: Identity,
        tenant: str,
        recipient: str,
        key: PublicIdentity,
        name: str,
        end: str,
    ) -> bool:
        """Publish the Offer; whether sealing it was possible at all is not the question."""
        kind, stream, now_s = type(sample).__name__, new_stream(), int(time.time())
        sealed = seal(
            encode(sample),
            tenant=tenant,
            sender_id=sender,
            recipient_id=recipient,
            kind=kind,
            task=f"forged-{len(self._sent)}",
            stream=stream,
            sequence=len(self._sent) + 1,
            created_s=now_s,
            expires_s=now_s + 600,
            sender=identity,
            recipient=key,
        )
        topic = f"v1/{OFFICE}/{name}/{end}"
        with self._lock:
            self._sent[stream] = (f"{kind} from {sender} in {tenant}", topic, sealed)
        keys = identity.public.to_bytes() if kind == "Enrol" else b""
        self.link.publish(topic, encode_frame(Offer(stream, sealed.manifest, keys)))
        return False

    def _hear(self, _topic: str, payload: bytes) -> None:
        if not payload:
            return
        frame = decode_frame(payload)
        if not isinstance(frame, Want | Done):
            return
        with self._lock:
            what, topic, sealed = self._sent.get(frame.stream, ("", "", None))
        if sealed is None:
            return
        self._last = time.monotonic()
        if isinstance(frame, Done):
            self.done.append(what)
            return
        for index, data in enumerate(sealed.chunks):
            self.link.publish(topic, encode_frame(Chunk(frame.stream, index, True, data)))

    def wait_for_silence(self) -> None:
        """Wait until nobody has wanted anything for a second."""
        until(lambda: time.monotonic() - self._last > 1.0, "silence")


# --- calls ------------------------------------------------------------------------------------


def _calls(folder: Path) -> tuple[int, list[str]]:
    """OFFICE's Fleet on HOME's own database, asked for HOME's device and token."""
    broker = MemoryBroker()
    home = Tenant(folder / HOME, broker.link(HOME), name=HOME).start()
    device = Device(folder / "device", broker.link(MEMBERS[HOME]))
    device.enrol(home.code(MEMBERS[HOME]))
    open_code = home.code("late")
    office = Fleet(home.desk.store, tenant=OFFICE, now=time.time)
    before, allowed, tried = _state(home), [], 0
    for name, method in inspect.getmembers(office, inspect.ismethod):
        if name.startswith("_"):
            continue
        arguments = _arguments(method, device, open_code)
        if arguments is None:
            continue
        tried += 1
        try:
            found = method(*arguments)
        except (EnrolmentError, RemoteProtocolError, ConfigError):
            found = None
        except FleetError as exc:
            raise LinkError(f"{name}: {exc}") from exc
        if found:
            allowed.append(f"Fleet.{name} returned {found!r}"[:120])
    if _state(home) != before:
        allowed.append("a call of the other tenant changed a row")
    device.close()
    home.close()
    return tried, allowed


def _arguments(method: Any, device: Device, code: EnrolmentCode) -> tuple[object, ...] | None:
    """Arguments that name HOME's device, its words or its token; None for methods without any."""
    from edge_sdk.wire.enrolment import state_keys
    from edge_sdk.wire.messages import Enrol, RenewKeys

    keys = device.member.ring.identity
    public, fresh = keys.public, Identity.generate()
    known: dict[str, object] = {
        "device": MEMBERS[HOME],
        "enrol": Enrol(code.token_id, code.secret, "late", public.sign, public.receive, (), 1),
        "keys": public,
        "words": RenewKeys("renew-1", *state_keys(HOME, MEMBERS[HOME], keys, fresh)),
        "family": None,
    }
    wanted = [
        p.name
        for p in inspect.signature(method).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if method.__name__ == "token":  # makes a code for a tenant's own, whatever the name
        return None
    return tuple(known[name] for name in wanted if name in known)


def _state(home: Tenant) -> list[tuple[Any, ...]]:
    with home.desk.store.transaction() as db:
        rows = [*db.execute("SELECT * FROM devices"), *db.execute("SELECT * FROM tokens")]
    return sorted(map(tuple, rows), key=repr)
