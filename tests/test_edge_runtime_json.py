"""JSON that fits a schema, whatever the model would rather say."""

import json
from collections.abc import Iterator

import pytest

from edge_sdk.errors import RuntimeFailure
from edge_sdk.runtime import SlmSession
from tests.edge_world import releases

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "moods": {"type": "array", "items": {"enum": ["calm", "busy"]}, "maxItems": 2},
    },
    "required": ["name", "age", "moods"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlmSession]:
    folder = releases(tmp_path_factory.mktemp("json")).folder / "targets" / "tiny" / "r1"
    with SlmSession.open(folder, max_tokens=100) as opened:
        yield opened


def check(person: dict[str, object]) -> None:
    assert list(person) == ["name", "age", "moods"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 6
    assert 0 <= int(str(person["age"])) <= 120
    assert isinstance(person["moods"], list)
    assert set(person["moods"]) <= {"calm", "busy"}


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)])
def test_the_answer_fits_the_schema(schema: object, session: SlmSession) -> None:
    check(json.loads(session.generate("x", schema=schema)))  # type: ignore[arg-type]


def test_a_hot_model_still_fits_the_schema(session: SlmSession) -> None:
    texts = {session.generate("x", schema=PERSON, temperature=5.0, seed=seed) for seed in range(8)}

    assert len(texts) > 4
    for text in texts:
        check(json.loads(text))


def test_batches_streams_and_references_fit_too(session: SlmSession) -> None:
    linked = {"$defs": {"yes": {"const": True}}, "type": "array", "items": {"$ref": "#/$defs/yes"}}
    linked |= {"minItems": 1, "maxItems": 2}

    for text in session.generate_many(["x", "a longer text", "y"], schema=PERSON):
        check(json.loads(text))
    check(json.loads("".join(session.stream("x", schema=PERSON))))
    assert json.loads(session.generate("x", schema=linked)) in ([True], [True, True])


def test_a_limit_that_cuts_the_json_off_is_an_error_and_shows_in_a_stream(
    session: SlmSession,
) -> None:
    with pytest.raises(RuntimeFailure, match=r"cut off after 4 tokens \(length\); allow more with"):
        session.generate("x", schema=PERSON, max_tokens=4)
    with pytest.raises(RuntimeFailure, match="cut off after 4 tokens"):
        session.generate_many(["x"], schema=PERSON, max_tokens=4)

    answer = session.stream("x", schema=PERSON, max_tokens=4)

    assert "".join(answer) == '{"na'
    assert answer.finish == "length"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "the JSON schema is not JSON"),
        ("[1]", "the JSON schema is a list, not an object"),
        ({"type": object()}, "the JSON schema is not JSON"),
        (7, "the JSON schema is not JSON"),
        ({"type": "nonsense"}, "the model refused the request: .*nonsense"),
        ({"$ref": "https://example.org/schema.json"}, "the model refused the request"),
        ({"type": "string", "pattern": "("}, "the model refused the request"),
        ({"enum": ["x" * 300_000]}, "the JSON schema has 300... bytes; allowed: 262144"),
    ],
)
def test_a_schema_that_is_none_is_refused_at_once(
    schema: object, said: str, session: SlmSession
) -> None:
    plain = session.generate("x", max_tokens=3)

    for ask in (session.generate, session.stream, session.conversation().say):
        with pytest.raises(RuntimeFailure, match=said):
            ask("x", schema=schema)  # type: ignore[arg-type]

    assert session.generate("x", max_tokens=3) == plain
