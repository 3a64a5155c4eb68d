"""Speculation over real sessions: the target's own tokens, and no speed where there is none."""

import itertools
from pathlib import Path

import pytest

from edge_sdk.errors import RuntimeFailure
from edge_sdk.guessing import Costs
from edge_sdk.runtime import SlmSession
from edge_sdk.speculation import Speculator
from exporters.slm import SlmOptions, export_slm
from tests.exporters_tiny import save_tiny

PROMPTS = ["Request: hello\nKind:", "name three rivers", "aaaaaaaa", "the cat and the cat and the"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Path:
    """Two tiny models with one tokenizer, exact in 32 bits; `target` differs from `draft`."""
    folder = tmp_path_factory.mktemp("pair")
    for name, seed in (("target", 0), ("draft", 1)):
        save_tiny(folder / f"hf-{name}", intermediate_size=64 + 64 * seed)
        export_slm(
            folder / f"hf-{name}",
            folder / name,
            family="tiny",
            release=name,
            options=SlmOptions(accuracy_level=1, threads=1),
        )
    return folder


@pytest.fixture(scope="module")
def target(bundles):
    with SlmSession(bundles / "target", max_tokens=40) as session:
        yield session


@pytest.fixture(scope="module")
def draft(bundles):
    with SlmSession(bundles / "draft") as session:
        yield session


def cheap(speculator: Speculator) -> Speculator:
    """Costs at which every guess pays, so that each test really guesses."""
    speculator.costs, speculator._usual_s = Costs(1.0, [1.0] * 7, 0.0), 1.0
    return speculator


@pytest.mark.parametrize("options", [{}, {"max_tokens": 1}, {"max_tokens": 7}], ids=str)
@pytest.mark.parametrize("ways", ["lookup", "draft", "both", "steady"])
def test_it_writes_what_the_session_writes(target, draft, ways, options):
    speculator = cheap(
        Speculator(
            target,
            draft if ways in ("draft", "both") else None,
            lookup=ways != "draft",
            steady=ways == "steady",
        )
    )
    for prompt in PROMPTS:
        expected = target.stream(prompt, **options)
        found = speculator.stream(prompt, **options)

        assert "".join(found) == "".join(expected)
        assert found.tokens == expected.tokens
        assert found.finish == expected.finish
    assert speculator.report().passes <= speculator.report().tokens


def test_the_target_as_its_own_draft_is_always_believed(target):
    speculator = cheap(Speculator(target, target, lookup=False))

    for prompt in PROMPTS:
        speculator.generate(prompt)

    report = speculator.report()
    assert report.alpha == 1.0
    assert report.tokens > 5 * report.passes


def test_sampling_is_the_targets_distribution(target, draft):
    """The second token after a prompt, drafted and drawn, against the session's own logits."""
    speculator = cheap(Speculator(target, draft, lookup=False))
    first, second = target.encode("x y z"), {}

    for seed in range(120):
        answer = speculator.stream("x y z", max_tokens=2, temperature=1.0, top_k=3, seed=seed)
        for _ in answer:
            pass
        if len(answer.tokens) == 2:
            second.setdefault(answer.tokens[0], []).append(answer.tokens[1])

    for token, drawn in second.items():
        logits = target.next_logits([*first, token])
        assert set(drawn) <= set(logits.argsort()[::-1][:3].tolist())
    assert sum(map(len, second.values())) > 100
    assert any(len(set(drawn)) > 1 for drawn in second.values())


def test_stop_strings_and_contexts_end_an_answer_as_in_the_session(target):
    text = target.generate(PROMPTS[0])
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    speculator = cheap(Speculator(target))

    assert speculator.generate(PROMPTS[0], stop=stop) == target.generate(PROMPTS[0], stop=stop)
    long = "ab " * ((target.context - 8) // target.count("ab ab ") * 2)
    assert target.count(long) < target.context
    assert speculator.generate(long, max_tokens=500) == target.generate(long, max_tokens=500)


def test_it_measures_and_says_what_it_costs(target, draft):
    ticks = itertools.count()
    speculator = Speculator(target, draft, clock=lambda: float(next(ticks)))

    costs = speculator.calibrate()

    assert costs.plain_s > 0
    assert costs.passes_s == [0.25] * 7  # one tick for four passes
    assert costs.draft_s == 0.25
    cheap(speculator).off = ""
    speculator.generate(PROMPTS[2])
    assert "predicted" in str(speculator.report())
    assert speculator.report().predicted >= 1.0


def test_what_loses_switches_itself_off_and_the_session_goes_on(target):
    """Costs that promise much, and a clock on which a pass takes ten times as long."""
    speculator = cheap(Speculator(target, target, lookup=False, clock=Slow()))
    speculator._usual = lambda: 1.0  # the session's own decoding did not become slower
    for _ in range(12):
        text = speculator.generate(PROMPTS[1])

    assert "times as fast" in speculator.off
    assert str(speculator.report()).startswith("speculation off (it was 0.")
    passes = speculator.report().passes
    assert text == speculator.generate(PROMPTS[1]) == target.generate(PROMPTS[1])
    assert speculator.report().passes == passes


class Slow:
    """Each look at this clock is ten seconds later; a plain pass is said to take one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def test_a_machine_where_nothing_can_be_won_is_left_alone(target):
    speculator = Speculator(target, clock=Slow())
    speculator._measured = lambda: Costs(1.0, [1.0 + g for g in range(7)])

    speculator.calibrate()

    assert "as much as one by one" in speculator.off
    assert speculator.generate("hello") == target.generate("hello")


def test_schemas_and_penalties_go_to_the_session(target):
    speculator = cheap(Speculator(target))

    expected = target.generate("hello", repetition_penalty=1.3)

    assert speculator.generate("hello", repetition_penalty=1.3) == expected
    assert speculator.report().passes == 0


def test_another_tokenizer_or_a_shorter_context_is_refused(bundles, target, tmp_path):
    save_tiny(tmp_path / "hf")
    other = tmp_path / "other"
    exact = SlmOptions(accuracy_level=1)
    export_slm(tmp_path / "hf", other, family="tiny", release="other", options=exact)
    (other / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes() + b" ")

    with (
        SlmSession(other, check=False) as stranger,
        pytest.raises(RuntimeFailure, match="another tokenizer"),
    ):
        Speculator(target, stranger)
    with (
        SlmSession(bundles / "draft", context=16) as short,
        pytest.raises(RuntimeFailure, match="context is 16"),
    ):
        Speculator(target, short)
    for bad in ("", "ab " * target.context):
        with pytest.raises(RuntimeFailure, match="prompt"):
            cheap(Speculator(target)).generate(bad)
