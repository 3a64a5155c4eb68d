"""A device drafts, the coordinator verifies: the target's own text, or the device goes on alone."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from coordinator.torch_target import TorchTarget
from coordinator.verifier import Verifier, VerifierLimits
from edge_sdk.agent import EdgeDevice
from edge_sdk.cloud_drafts import CloudDrafts
from edge_sdk.errors import LinkError, RuntimeFailure
from edge_sdk.link.broker import find_mosquitto, start_broker
from edge_sdk.link.courier import Courier
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.runtime import SlmSession
from edge_sdk.store.ledger import Ledger
from edge_sdk.store.mailbox import Mailbox
from edge_sdk.wire.messages import Refused, Scores, Verified, VerifyDraft
from edge_sdk.wire.seal import Identity
from exporters.slm import SlmOptions, export_slm
from tests.edge_world import Coordinator, config, offer, releases
from tests.exporters_tiny import save_tiny

KEYS = {name: Identity.generate() for name in ("coordinator", "kitchen")}
USERS = {"coordinator": "c-secret", "kitchen": "k-secret"}
PROMPTS = ["Request: hello\nKind:", "name three rivers", "aaaaaaaa"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny target in 32 bits, and a draft bundle: the same weights rounded to four bits."""
    folder = tmp_path_factory.mktemp("verifier")
    save_tiny(folder / "target")
    exact = SlmOptions(accuracy_level=1, threads=1)
    export_slm(folder / "target", folder / "draft", family="tiny", release="r", options=exact)
    return folder


@pytest.fixture(scope="module")
def target(models) -> TorchTarget:
    return TorchTarget(models / "target")


@pytest.fixture(scope="module")
def session(models):
    with SlmSession(models / "draft", max_tokens=24) as opened:
        yield opened


def verifier(target: TorchTarget, **limits) -> Verifier:
    return Verifier(target, rng=np.random.default_rng(0), limits=VerifierLimits(**limits))


def written(target: TorchTarget, session: SlmSession, prompt: str, count: int = 24) -> list[int]:
    """What the target writes alone, token by token, up to its end token."""
    rows, text = target.rows(), session.encode(prompt)
    after = rows.read(text)[-1]
    while len(text) < len(session.encode(prompt)) + count:
        text.append(int(after.argmax()))
        if text[-1] in target.ends:
            break
        after = rows.read(text[-1:])[-1]
    return [t for t in text[len(session.encode(prompt)) :] if t not in target.ends]


def direct(checker: Verifier, name: str = "kitchen"):
    """Ask without a network."""
    return lambda question, timeout_s: checker.answer(name, question)


@contextmanager
def courier(folder: Path, link, name: str, **options) -> Iterator[Courier]:
    public = {other: identity.public for other, identity in KEYS.items()}
    mailbox = Mailbox(folder / f"{name}.db")
    ledger = Ledger(mailbox, time.time) if name != "coordinator" else None
    with Courier(
        link,
        mailbox,
        KEYS[name],
        tenant="home",
        me=name,
        lookup=public.get,
        now=time.time,
        rng=random.Random(1),
        ledger=ledger,
        **options,
    ) as running:
        yield running
    mailbox.close()


def asking(running: Courier):
    return lambda question, timeout_s: running.calls.ask(
        "coordinator", question, timeout_s=timeout_s
    )


def connected(running: Courier) -> None:
    deadline = time.monotonic() + 20
    while not running._link.connected:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def tokens(drafts: CloudDrafts, prompt: str, **options) -> list[int]:
    answer = drafts.stream(prompt, **options)
    for _ in answer:
        pass
    return answer.tokens


def test_over_a_real_broker_the_device_writes_what_the_target_writes(
    tmp_path, target, session
) -> None:
    kind = "mosquitto" if find_mosquitto() else "amqtt"
    version = "5" if kind == "mosquitto" else "3.1.1"
    checker = verifier(target)
    with start_broker(tmp_path / "broker", users=USERS, prefer=kind) as broker:
        links = [MqttLink(broker.url_for(name), mqtt_version=version) for name in USERS]
        with (
            courier(tmp_path, links[0], "coordinator") as coordinator,
            courier(tmp_path, links[1], "kitchen") as kitchen,
        ):
            checker.serve(coordinator.calls)
            connected(coordinator)
            connected(kitchen)
            drafts = CloudDrafts(session, asking(kitchen), even_if_slower=True, timeout_s=20)

            for prompt in PROMPTS:
                assert tokens(drafts, prompt) == written(target, session, prompt)

            report = drafts.report
            assert report.alone == ""
            assert report.passes < report.tokens
            assert report.trip_s > 0
            assert report.one_s > 0
            assert kitchen.mailbox.pending("coordinator") == []  # nothing waits on a disk

            broker.close()
            broken = drafts.stream(PROMPTS[0], max_tokens=8)
            for _ in broken:
                pass

    assert broken.finish in ("length", "stop")
    assert "not connected" in drafts.report.alone or "no answer" in drafts.report.alone


def test_what_the_broker_sees_is_sealed_and_the_ledger_has_a_line_for_each(
    tmp_path, target, session
) -> None:
    broker, seen = MemoryBroker(), []
    spy = broker.link("spy")
    spy.subscribe("#", lambda topic, payload: seen.append(payload))
    spy.connect()
    with (
        courier(tmp_path, broker.link("coordinator"), "coordinator") as coordinator,
        courier(tmp_path, broker.link("kitchen"), "kitchen") as kitchen,
    ):
        verifier(target).serve(coordinator.calls)
        drafts = CloudDrafts(session, asking(kitchen), even_if_slower=True)

        tokens(drafts, "hello hello hello")

        calls = [frame for frame in seen if frame[:1] == b"\x08"]
        assert len(calls) == 2 * drafts.report.passes
        ids = bytes(session.encode("hello hello hello"))
        assert not any(ids in frame or b"hello" in frame for frame in calls)
        entries = Ledger(kitchen.mailbox, time.time).entries()
        assert [entry.kind for entry in entries] == ["VerifyDraft"] * drafts.report.passes
        assert set(entries[0].fields) == set(VerifyDraft.__struct_fields__)

        before = drafts.report.passes
        for frame in [frame for frame in calls if frame]:  # what was recorded, once more
            spy.publish("v1/home/kitchen/up", frame)
            spy.publish("v1/home/stranger/up", frame)
        spy.publish("v1/home/kitchen/up", b"\x08")
        spy.publish("v1/home/kitchen/up", bytes(calls[0][:-1]) + b"!")
        assert tokens(drafts, "hello hello hello") == written(target, session, "hello hello hello")

    answered = [frame for frame in seen if frame[:1] == b"\x08"]
    asked_again = 2 * len(calls) + 2
    assert len(answered) == len(calls) + asked_again + 2 * (drafts.report.passes - before)


def test_a_context_that_was_forgotten_is_sent_again(target, session) -> None:
    checker = verifier(target, texts=1)
    drafts = [CloudDrafts(session, direct(checker, name), even_if_slower=True) for name in "ab"]
    answers = [d.stream(PROMPTS[i]) for i, d in enumerate(drafts)]

    for _ in zip_longest(*answers):  # in turns: each takes the other's place
        pass

    assert checker.held == 1
    for i, answer in enumerate(answers):
        assert answer.tokens == written(target, session, PROMPTS[i])


def test_limits_hold_by_device_and_by_time(target, session) -> None:
    now = [0.0]
    checker = Verifier(
        target,
        rng=np.random.default_rng(0),
        limits=VerifierLimits(texts=3, per_device=2, idle_s=10.0),
        clock=lambda: now[0],
    )
    for task in "abc":
        checker.answer("kitchen", VerifyDraft(task, target.tokenizer, 0, (5, 6), ()))
    assert checker.held == 2
    for device in ("garage", "attic"):
        checker.answer(device, VerifyDraft("a", target.tokenizer, 0, (5,), ()))
    assert checker.held == 3

    now[0] = 11.0
    found = checker.answer("garage", VerifyDraft("a", target.tokenizer, 1, (6,), ()))

    assert found.tokens == ()
    assert checker.held == 0


def test_drafts_are_judged_as_the_rule_says(target, session) -> None:
    checker, text = verifier(target, draft=4), session.encode("abc")
    right = written(target, session, "abc", 8)

    best = checker.answer("k", VerifyDraft("t", target.tokenizer, 0, tuple(text), tuple(right)))
    wrong = (right[0], (right[1] + 1) % 257, 7)
    some = checker.answer("k", VerifyDraft("t", target.tokenizer, 0, tuple(text), wrong))

    assert best.tokens == tuple(right[:5])
    assert best.accepted == 4
    assert some.tokens == tuple(right[:2])
    assert some.accepted == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer": bytes(32)}, "tokenizer"),
        ({"draft": (320,)}, "token 320 is outside the target's vocabulary of 320"),
        ({"text": (2**31 - 1,)}, "outside"),
        ({"text": ()}, "0 tokens does not fit"),
        ({"text": (5,) * 128}, "128 tokens does not fit the context of 128"),
        ({"at": 127}, "128 tokens does not fit"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(target, changes, reason) -> None:
    fields = {"task_id": "t", "tokenizer": target.tokenizer, "at": 0, "text": (5,), "draft": ()}

    answer = verifier(target).answer("kitchen", VerifyDraft(**(fields | changes)))

    assert isinstance(answer, Refused)
    assert reason in answer.reason
    assert verifier(target).answer("kitchen", Scores("t", ())) is None


def test_a_refusal_or_silence_lets_the_device_go_on_alone(session) -> None:
    def silent(question, timeout_s):
        raise LinkError("no answer within 0.1 s")

    answers = {
        "refused here": lambda question, timeout_s: Refused(question.task_id, "refused here"),
        "no answer": silent,
        "something else": lambda question, timeout_s: Scores("t", ()),
        "something else ": lambda q, timeout_s: Verified(q.task_id, (5,) * 60, 0, 0.0, 1.0),
        "does not keep": lambda q, timeout_s: Verified(q.task_id, (), 0, 0.0, 1.0),
    }
    for why, ask in answers.items():
        told: list[str] = []
        drafts = CloudDrafts(session, ask, on_alone=told.append)

        assert tokens(drafts, PROMPTS[0]) == tokens_alone(session, PROMPTS[0])
        assert why.strip() in drafts.report.alone
        assert told == [drafts.report.alone]


def tokens_alone(session: SlmSession, prompt: str) -> list[int]:
    answer = session.stream(prompt)
    for _ in answer:
        pass
    return answer.tokens


def test_a_round_trip_that_loses_switches_it_off_and_insisting_keeps_it(target, session) -> None:
    now = [0.0]
    checker = verifier(target)
    checker.one_s = 0.010

    def far(question, timeout_s):
        now[0] += 1.0
        found = checker.answer("kitchen", question)
        return Verified(found.task_id, found.tokens, found.accepted, 0.012, found.one_s)

    drafts = CloudDrafts(session, far, clock=lambda: now[0])
    insisting = CloudDrafts(session, far, clock=lambda: now[0], even_if_slower=True)

    tokens(drafts, PROMPTS[0])

    assert "round trip of 988.0 ms" in drafts.report.alone
    assert drafts.report.passes == 4
    assert 0 < drafts.report.predicted(8) < 1 > drafts.report.measured > 0
    assert tokens(insisting, PROMPTS[0]) == written(target, session, PROMPTS[0])


def test_schemas_stay_on_the_device(session) -> None:
    drafts = CloudDrafts(session, lambda question, timeout_s: None)

    with pytest.raises(RuntimeFailure, match="own session"):
        drafts.generate("hello", schema={"type": "boolean"})
    with pytest.raises(RuntimeFailure, match="empty"):
        drafts.generate("")


def test_a_device_that_did_not_switch_it_on_sends_nothing(tmp_path) -> None:
    with (
        EdgeDevice(config(tmp_path)) as device,
        pytest.raises(RuntimeFailure, match=r"runtime\.cloud_drafts = true"),
    ):
        device.cloud_drafts()


def test_a_whole_device_and_the_coordinators_courier(tmp_path) -> None:
    """An enrolled device with a received model, over its own courier."""
    coordinator = Coordinator(tmp_path, releases(tmp_path))
    settings = config(tmp_path, "[runtime]\ncloud_drafts = true\nmax_tokens = 12")
    with EdgeDevice(settings, link=coordinator.broker.link("kitchen")) as device:
        worker = threading.Thread(target=device.enrol, args=(coordinator.code("kitchen"),))
        worker.start()
        while worker.is_alive():
            coordinator.courier.wait_for_mail(0.02)
            coordinator.turn()
        coordinator.send("kitchen", offer(coordinator.publisher, "r1"))
        coordinator.talk(device, until=2)

        save_tiny(tmp_path / "large")
        large = TorchTarget(tmp_path / "large")
        verifier(large).serve(coordinator.courier.calls)
        drafts = device.cloud_drafts(even_if_slower=True, timeout_s=20.0)
        found = tokens(drafts, "hello hello")

        assert drafts.report.alone == ""
        assert found == written(large, device.session, "hello hello", 12)
        assert any(entry.kind == "VerifyDraft" for entry in device.ledger.entries())
    coordinator.close()
