"""A whole device over the memory link: it enrols, receives, answers, trains, refuses, resumes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.agent import EdgeDevice
from edge_sdk.calibration import MIN_TEXTS, fit_temperature, tempered
from edge_sdk.collect import Example
from edge_sdk.errors import (
    ConfigError,
    DataError,
    EnrolmentError,
    LinkError,
    RuntimeFailure,
    StorageError,
)
from edge_sdk.wire.messages import (
    AdapterUpdate,
    ModelReport,
    OfferData,
    OfferModel,
    Refused,
    Score,
    Scores,
    WantFiles,
    encode,
)
from tests.edge_world import (
    TASK,
    Coordinator,
    codec_for_rank_2,
    config,
    example_set,
    offer,
    order,
    releases,
)

NAME = "kitchen-1"


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path, releases(tmp_path))
    yield made
    made.close()


def opened(coordinator: Coordinator, folder: Path, text: str = "", **options: object) -> EdgeDevice:
    return EdgeDevice(
        config(folder, text),
        link=coordinator.broker.link(NAME),
        **options,  # type: ignore[arg-type]
    )


def enrolled(coordinator: Coordinator, device: EdgeDevice, code: str = "") -> None:
    """Enrol `device` while the coordinator answers."""
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            coordinator.courier.wait_for_mail(0.05)
            coordinator.turn()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        device.enrol(code or coordinator.code(NAME), timeout_s=10)
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def device(coordinator: Coordinator, tmp_path: Path) -> Iterator[EdgeDevice]:
    with opened(coordinator, tmp_path, "[data]\nheld_out = 0.3") as made:
        enrolled(coordinator, made)
        made.add_examples(example_set(30))
        yield made


def asked(coordinator: Coordinator, device: EdgeDevice, message, until: int = 1) -> list:  # type: ignore[no-untyped-def]
    coordinator.replies.clear()
    coordinator.send(NAME, message)
    return list(coordinator.talk(device, until=until))


def test_the_whole_life_of_a_device(coordinator: Coordinator, device: EdgeDevice) -> None:
    """Offer, files, report; training with error feedback; an adapter; scores."""
    want, report = asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
    assert isinstance(want, WantFiles)
    assert isinstance(report, ModelReport)
    assert report.release == "r1"
    assert report.examples == len(device._examples.held_out()) > 0
    assert report.tokens_per_s > 0
    assert set(report.seconds) == {"verify", "swap", "measure"}
    assert device.classify("open request") in TASK.labels
    plain = device.generate("Request: hello", max_tokens=8)
    assert plain == "".join(device.stream("Request: hello", max_tokens=8))

    (first,) = asked(coordinator, device, order(task_id="train-0"))
    (second,) = asked(coordinator, device, order(task_id="train-1", codec=b""))
    assert isinstance(first, AdapterUpdate)
    assert isinstance(second, AdapterUpdate)
    change = codec_for_rank_2().decode(first.codes)
    assert any(np.abs(value).max() > 0 for value in change.values())
    assert first.examples == len(device._examples.training())
    assert first.raw_bytes == 4 * 4 * 2 * 64
    assert second.codes != first.codes  # the same training, plus what was owed

    before = device.session
    want, report = asked(coordinator, device, offer(coordinator.publisher, "a1"), until=2)
    assert report.release == "a1"
    assert device.session is before  # hot swap: nothing was loaded again
    assert device.generate("Request: hello", max_tokens=8) != plain

    (scores,) = asked(
        coordinator, device, Score("score-1", "a1", ("hello", "list this"), ("open", "list"))
    )
    assert isinstance(scores, Scores)
    held_out = device._examples.held_out()
    assert len(held_out) >= MIN_TEXTS
    known = device.session.label_probabilities([x.text for x in held_out])
    heat = fit_temperature(known, [TASK.labels.index(x.label) for x in held_out])
    said = tempered(device.session.label_probabilities(["hello", "list this"]), heat)
    assert np.allclose(scores.scores, [said[0, 0], said[1, 1]], atol=1e-5)  # open, list
    assert heat != 1.0


def test_what_does_not_fit_is_refused_with_a_reason(
    coordinator: Coordinator, device: EdgeDevice
) -> None:
    cases = [
        (order(release="r9"), "task is for release r9, this device runs none"),
        (Score("s", "r1", ("a",), ("open",)), "this device runs none"),
        (
            OfferModel("o", "tiny", "r1", {}, ("tiny/r1/model.onnx",)),
            "metadata cannot be used: the offer lacks timestamp.json",
        ),
    ]
    for message, said in cases:
        (reply,) = asked(coordinator, device, message)
        assert isinstance(reply, Refused)
        assert said in reply.reason

    asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
    cases = [
        (order(task_id="a", codec=b"", codec_id="0" * 32), "codec 000"),
        (order(task_id="b", codec=b"rubbish"), "the codec cannot be used"),
        (order(task_id="c", targets=("nothing",)), "do not fit this model"),
        (order(task_id="d", adapter=b"rubbish"), "not an adapter"),
        (order(task_id="e", steps=10**6), "over this device's limit"),
        (order(task_id="f", rank=3), "has shape (2, 64), expected (3, 64)"),
        (Score("g", "r1", ("a",), ("no such label",)), "labels that its text task does not have"),
        (Score("h", "r1", ("a", "b"), ("open",)), "differ in number"),
    ]
    for message, said in cases:
        (reply,) = asked(coordinator, device, message)
        assert isinstance(reply, Refused)
        assert said in reply.reason
    assert device.classify("the model still answers") in TASK.labels


def test_a_refusal_quotes_no_example_and_no_path(
    coordinator: Coordinator, device: EdgeDevice, tmp_path: Path
) -> None:
    asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
    device.add_examples([Example(f"a secret text {i}", "secret label") for i in range(9)])

    (reply,) = asked(coordinator, device, order())

    assert isinstance(reply, Refused)
    assert "secret" not in reply.reason
    assert str(tmp_path) not in reply.reason


def test_a_wrong_file_is_refused_and_the_old_model_stays(
    coordinator: Coordinator, device: EdgeDevice
) -> None:
    asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
    honest = coordinator.publisher.read
    coordinator.publisher.read = lambda path: honest(path)[::-1]  # type: ignore[method-assign]

    replies = asked(coordinator, device, offer(coordinator.publisher, "r2"), until=2)

    assert isinstance(replies[1], Refused)
    assert "not the file that was signed" in replies[1].reason
    assert device.status()["release"] == "r1"
    coordinator.publisher.read = honest  # type: ignore[method-assign]
    replies = asked(coordinator, device, offer(coordinator.publisher, "r2", "again"), until=2)
    assert replies[-1].release == "r2"


def test_a_device_that_stops_amid_files_goes_on_after_a_restart(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    first = opened(coordinator, tmp_path)
    enrolled(coordinator, first)
    coordinator.send(NAME, offer(coordinator.publisher, "r1"))
    while not coordinator.replies:
        first.step(timeout_s=0.02)
        coordinator.turn()
    first.step(timeout_s=0.5)
    first.close()

    with opened(coordinator, tmp_path) as second:
        replies = coordinator.talk(second, until=2)

        assert isinstance(replies[-1], ModelReport)
        assert second.membership is not None
        assert second.status()["release"] == "r1"


def test_synthetic_data_is_kept_and_only_newer_counts(
    coordinator: Coordinator, device: EdgeDevice
) -> None:
    asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
    two = OfferData("d2", 2, ("open it", "list it"), ("open", "list"), (1.0, 0.5))
    one = OfferData("d1", 1, ("old",), ("open",), (1.0,))
    for message in (two, one):
        coordinator.send(NAME, message)
    (reply,) = asked(coordinator, device, order(synthetic_weight=0.5))

    assert isinstance(reply, AdapterUpdate)
    assert device._memory.recall("synthetic") == encode(two)


def test_the_explanation_names_every_field_and_no_text(
    coordinator: Coordinator, device: EdgeDevice
) -> None:
    asked(coordinator, device, offer(coordinator.publisher, "r1"), until=2)
    asked(coordinator, device, order())

    rows = device.explain()

    update = {row.field: row for row in rows if row.message == "AdapterUpdate"}
    assert set(update) == set(AdapterUpdate.__struct_fields__)
    assert update["codes"].state == "sent"
    assert update["codes"].bytes > 100
    assert {row.to for row in rows} == {"coordinator"}
    assert {row.key for row in rows} == {coordinator.identity.public.receive_id.hex()}
    # Cloud drafts are off here; the one message that carries text, as tokens, says so of itself.
    told = [row for row in rows if row.message != "VerifyDraft"]
    assert not {"text", "texts", "label", "labels"} & {row.field for row in told}
    (said,) = (row for row in rows if (row.message, row.field) == ("VerifyDraft", "text"))
    assert said.state not in ("sent", "waiting")
    assert "only where cloud drafts are switched on" in said.meaning


def test_a_used_or_foreign_code_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    code = coordinator.code(NAME)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with opened(coordinator, tmp_path / "one") as first:
        enrolled(coordinator, first, code)
        with pytest.raises(EnrolmentError, match="enrolled as kitchen-1 of home"):
            first.enrol(code)

    with opened(coordinator, tmp_path / "two") as second:
        with pytest.raises(EnrolmentError, match="was used already"):
            enrolled(coordinator, second, code)
        with pytest.raises(EnrolmentError, match="starts with"):
            second.enrol("nonsense")
        assert second.membership is None
        with pytest.raises(EnrolmentError, match="not enrolled"):
            second.step()
    # The device before it goes on unharmed.
    with opened(coordinator, tmp_path / "one") as first:
        assert first.step() == 0


def test_an_expired_code_is_refused_before_anything_is_sent(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    with opened(coordinator, tmp_path) as device:
        with pytest.raises(EnrolmentError, match="expired"):
            device.enrol(coordinator.code(NAME, lifetime_s=-10))


def test_no_coordinator_is_a_link_error(coordinator: Coordinator, tmp_path: Path) -> None:
    code = coordinator.code(NAME)
    silent = type(coordinator.broker)()
    with EdgeDevice(config(tmp_path), link=silent.link(NAME)) as device:
        with pytest.raises(LinkError, match="did not arrive"):
            device.enrol(code, timeout_s=0.2)


def test_an_enrolment_that_got_no_answer_can_be_tried_again(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    code = coordinator.code(NAME)
    with opened(coordinator, tmp_path) as device:
        with pytest.raises(LinkError, match="has not answered"):
            device.enrol(code, timeout_s=0.5)  # accepted, but nobody turns the coordinator

        enrolled(coordinator, device, code)

        assert device.membership is not None
        assert device.membership.complete


def test_one_process_runs_a_device_at_a_time(coordinator: Coordinator, tmp_path: Path) -> None:
    with opened(coordinator, tmp_path) as first:
        enrolled(coordinator, first)
        with opened(coordinator, tmp_path) as second:
            with pytest.raises(StorageError, match="another process already runs"):
                second.step()
            assert second.status()["device"] == NAME


def test_it_runs_in_the_background_and_stops(coordinator: Coordinator, tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    with opened(coordinator, tmp_path, on_event=events.append) as device:
        enrolled(coordinator, device)
        thread = device.run_in_background()
        coordinator.send(NAME, Score("s", "r1", ("a",), ("open",)))
        assert coordinator.courier.wait_for_mail(10)
    coordinator.turn()

    assert not thread.is_alive()
    assert isinstance(coordinator.replies[0], Refused)
    assert [event["event"] for event in events] == ["enrolled", "task", "refused", "reply"]


def test_a_device_without_a_model_says_so(tmp_path: Path, coordinator: Coordinator) -> None:
    with opened(coordinator, tmp_path) as device:
        enrolled(coordinator, device)
        with pytest.raises(RuntimeFailure, match="no model has arrived yet"):
            device.generate("hello")


def test_nothing_starts_on_bad_settings_or_data(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text('[data]\nexamples = "own.jsonl"')
    with pytest.raises(DataError, match="cannot read"):
        EdgeDevice.from_config(tmp_path / "edge.toml")
    with pytest.raises(ConfigError, match="unknown key 'threds'"):
        EdgeDevice.from_config(tmp_path / "edge.toml", train__threds=2)
