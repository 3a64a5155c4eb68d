"""A notes application: labels, shortens and searches notes with one small model, never online.

python -m examples.notes_app          # from a clone; the first run exports a small model

health   No fever, no pain.
shopping Buy bread and cheese, and look for apples at the market.
travel   Seat 61, train at seven
'my bus ticket' -> Seat 61, train at seven. Anna waits at the station. The hotel is close to it.
"""

import random
import tempfile
from pathlib import Path

from edge_sdk import Example, SlmSession
from edge_sdk.wire.messages import TextTask
from examples.ready import learn, ready

WORDS = {  # what the user has filed so far, in short
    "shopping": "buy milk bread eggs market rice apples cheese",
    "health": "doctor dentist pills pain hospital teeth fever nurse",
    "travel": "train ticket bus station flight hotel seat passport",
}
TASK = TextTask("notes", "{text}\nKind:", "{label}", tuple(WORDS), (" shop", " health", " travel"))
NOTES = """The dentist looked at my teeth on Monday. It was raining. No fever, no pain.
We have no eggs. Buy bread and cheese, and look for apples at the market.
Seat 61, train at seven. Anna waits at the station. The hotel is close to it.""".splitlines()

if __name__ == "__main__":
    rng, path = random.Random(1), Path(tempfile.mkdtemp()) / "notes.onnx_adapter"
    told = [Example(" ".join(rng.sample(WORDS[k].split(), 4)), k) for k in 25 * list(WORDS)]
    with SlmSession(ready("slm-a"), task=TASK) as session:
        session.set_adapter(learn(session.folder, TASK, told, path))
        kinds = session.label_probabilities  # texts -> (texts, labels)
        for note, label in zip(NOTES, session.classify_many(NOTES), strict=True):
            parts = note.split(". ")  # the sentence that is most about what the note is about
            print(f"{label:8} {parts[(kinds(parts) @ kinds([note])[0]).argmax()]}")
        query = "my bus ticket"
        print(f"{query!r} -> {NOTES[(kinds(NOTES) @ kinds([query])[0]).argmax()]}")
