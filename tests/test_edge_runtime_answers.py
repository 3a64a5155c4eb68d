"""How an answer is asked for, written, and ended."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import RuntimeFailure
from edge_sdk.runtime import SlmSession
from edge_sdk.stops import StopFilter
from tests.edge_world import releases

PROMPT = "Request: hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases(tmp_path_factory.mktemp("answers")).folder / "targets" / "tiny"


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[SlmSession]:
    with SlmSession.open(folder / "r1") as opened:
        yield opened


@given(
    pieces=st.lists(st.text("ab\n", max_size=3), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_what_is_shown_ends_where_the_first_stop_string_begins(
    pieces: list[str], stops: list[str]
) -> None:
    """However the text was cut into pieces, and nothing shown is ever taken back."""
    text = "".join(pieces)
    ends = [text.index(stop) for stop in stops if stop in text]

    filtered = StopFilter(stops)
    shown = "".join([filtered.feed(piece) for piece in pieces])
    shown += filtered.end()

    assert shown == text[: min(ends, default=len(text))]
    assert bool(filtered.found) == bool(ends)


def test_a_stop_string_split_over_tokens_is_not_shown(session: SlmSession) -> None:
    """The tiny model writes a token per byte, so every longer stop string is split."""
    whole = session.generate(PROMPT, max_tokens=24)
    stop = whole[6:9]
    expected = whole[: whole.index(stop)]

    answer = session.stream(PROMPT, max_tokens=24, stop=["never", stop])
    pieces = list(answer)

    assert "".join(pieces) == answer.text == expected
    assert answer.finish == "stop"
    assert session.generate_many([PROMPT], max_tokens=24, stop=stop) == [expected]


def test_a_beginning_of_a_stop_string_that_stays_one_is_shown_at_the_end(
    session: SlmSession,
) -> None:
    whole = session.generate(PROMPT, max_tokens=8)

    assert session.generate(PROMPT, max_tokens=8, stop=whole[-2:] + "?") == whole


def test_an_answer_says_what_it_cost_and_why_it_ended(session: SlmSession) -> None:
    answer = session.stream(PROMPT, max_tokens=5)
    assert (answer.finish, answer.text, answer.tokens) == ("", "", [])

    text = "".join(answer)

    assert answer.finish == "length"
    assert answer.text == text == session.decode(answer.tokens)
    assert len(answer.tokens) == 5
    assert answer.prompt_tokens == answer.read_tokens == session.count(PROMPT)
    assert 0 < answer.first_token_s < 10
    assert answer.tokens_per_s == session.tokens_per_s > 0
    assert next(answer, "ended") == "ended"


def test_the_models_own_end_is_told_from_a_limit(session: SlmSession) -> None:
    answer = session.stream(PROMPT, max_tokens=20, schema={"const": "x"})

    assert "".join(answer) == '"x"'
    assert answer.finish == "stop"
    assert len(answer.tokens) == 3  # the end token is not among them


def test_an_answer_fills_the_context_and_no_more(session: SlmSession) -> None:
    answer = session.stream("x" * 120, max_tokens=50)
    for _ in answer:
        pass

    assert answer.finish == "length"
    assert len(answer.tokens) == session.context - 120


def test_sampling_options_narrow_and_repeat(session: SlmSession) -> None:
    greedy = session.generate(PROMPT, max_tokens=16)
    warm = {"temperature": 2.0, "max_tokens": 16}

    assert session.generate(PROMPT, top_k=1, seed=1, **warm) == greedy
    assert session.generate(PROMPT, top_p=1e-6, seed=1, **warm) == greedy
    assert session.generate(PROMPT, seed=1, **warm) == session.generate(PROMPT, seed=1, **warm)
    assert len({session.generate(PROMPT, seed=seed, **warm) for seed in range(4)}) == 4
    assert session.generate(PROMPT, seed=3, max_tokens=16) == greedy  # without a temperature


def test_a_repetition_penalty_leaves_fewer_repetitions(session: SlmSession) -> None:
    plain = session.stream("aaaa", max_tokens=40)
    other = session.stream("aaaa", max_tokens=40, repetition_penalty=3.0)
    for _ in (*plain, *other):
        pass

    assert len(set(other.tokens)) > len(set(plain.tokens)) + 5


def test_a_batch_writes_what_each_prompt_gives_alone(session: SlmSession) -> None:
    """Prompts of different lengths, more of them than one batch takes, in their order."""
    prompts = [PROMPT[: 3 + i % 12] + str(i) for i in range(40)] + ["x" * 120, "y" * 124]

    together = session.generate_many(prompts, max_tokens=6)

    assert together == [session.generate(prompt, max_tokens=6) for prompt in prompts]


def test_a_set_event_ends_the_answer_before_its_next_token(session: SlmSession) -> None:
    cancel = threading.Event()
    answer = session.stream(PROMPT, max_tokens=100, cancel=cancel)
    first = next(answer)
    cancel.set()

    rest = list(answer)

    assert answer.finish == "cancelled"
    assert "".join([first, *rest]) == answer.text
    assert len(answer.tokens) < 10
    assert session.generate(PROMPT, cancel=cancel) == ""  # set before the prompt was read
    assert session.generate_many([PROMPT] * 2, cancel=cancel) == ["", ""]


def test_time_that_is_up_ends_the_answer_where_it_is(session: SlmSession) -> None:
    answer = session.stream(PROMPT, max_tokens=100, time_s=1e-9)

    assert list(answer) == []
    assert (answer.finish, answer.first_token_s) == ("time", 0.0)
    assert session.generate(PROMPT, max_tokens=4, time_s=60) == session.generate(
        PROMPT, max_tokens=4
    )


def test_an_answer_closed_early_frees_its_model_state(session: SlmSession, folder: Path) -> None:
    """genai refuses to unload an adapter as long as a generator that uses it lives."""
    session.load_adapter("brief", folder / "a1" / "adapter.onnx_adapter")
    answer = session.stream(PROMPT, max_tokens=50, adapter="brief")
    next(answer)
    with pytest.raises(RuntimeFailure, match="used by an answer"):
        session.unload_adapter("brief")

    answer.close()
    answer.close()

    session.unload_adapter("brief")
    assert answer.finish == "cancelled"
    assert list(answer) == []


def test_threads_get_what_they_would_alone(session: SlmSession) -> None:
    prompts = [f"Request: number {i}" for i in range(12)]
    alone = [session.generate(prompt, max_tokens=12) for prompt in prompts]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: session.generate(prompt, max_tokens=12), prompts))

    assert together == alone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 or more"),
        ({"temperature": -0.1}, "temperature is -0.1; allowed: 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "an option is of the wrong kind"),
        ({"top_p": 0}, "top_p is 0; allowed: above 0, at most 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": 2**31}, "seed is 2147483648; allowed: 0 to 2147483647"),
        ({"seed": "one"}, "an option is of the wrong kind"),
        ({"time_s": 0}, "time_s is 0"),
        ({"stop": [""]}, "stop has an empty text"),
        ({"stop": ["x"] * 65}, "stop is 65; allowed: at most 64"),
        ({"stop": 5}, "an option is of the wrong kind"),
        ({"adapter": "nobody"}, "no adapter 'nobody' is loaded .loaded: none.; load_adapter"),
        ({"random_seed": 1}, "unknown option 'random_seed'; known are adapter, cancel, max_tokens"),
    ],
)
def test_a_refused_option_is_named_with_its_limit(
    options: dict[str, object], said: str, session: SlmSession
) -> None:
    for ask in (session.generate, session.stream, session.conversation().say):
        with pytest.raises(RuntimeFailure, match=said):
            ask(PROMPT, **options)
    with pytest.raises(RuntimeFailure, match=said):
        session.generate_many([PROMPT], **options)

    assert session.generate(PROMPT, max_tokens=2)


def test_one_prompt_too_long_refuses_the_batch_and_nothing_else(session: SlmSession) -> None:
    with pytest.raises(RuntimeFailure, match="128 tokens and the model's context is 128; shorten"):
        session.generate_many(["x", "x" * 128])

    assert session.generate_many([]) == []
    last = session.stream("x" * 127, max_tokens=9)
    assert "".join(last) == last.text
    assert len(last.tokens) == 1
