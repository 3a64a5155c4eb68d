"""Cut the demo's slices out of Dolly-15k: `python examples/data/make.py --data DATA`.

Knows which client of the published ten-client split plays which part.  Does not know what the demo
does with them.  Every choice follows a hash of the text, so the slices come out the same anywhere.
"""

import argparse
import hashlib
import json
import lzma
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from examples.data.corpus import (
    DOLLY,
    PUBLIC,
    PUBLIC_CLIENTS,
    REQUEST_CHARS,
    CorpusError,
    Row,
    read_rows,
)

HERE = Path(__file__).resolve().parent
DEVICE_CLIENTS = (0, 1, 2, 3)
TEST_CLIENTS = (-1, 9)  # the split's global test, ten of each label, and one client of its own
SHORTEST_CHARS = 8
TRAIN_PER_DEVICE = 700
HELD_OUT_PER_DEVICE = 200
HELD_OUT_SHARE = 0.2
TEST_PER_LABEL = 24  # of client 9, whose rarest labels have 5 and 12
PUBLIC_REQUESTS = 4000

Record = dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Request:
    """One Dolly instruction on one line; `place` in [0, 1) orders and splits."""

    text: str
    label: str
    client: int
    place: float


def requests(rows: list[Row]) -> list[Request]:
    """Requests of a fitting length in hash order, no text twice; test clients keep theirs first."""
    found: dict[str, Request] = {}
    parts = (TEST_CLIENTS, DEVICE_CLIENTS, tuple(sorted(PUBLIC_CLIENTS)))
    for row in (row for part in parts for row in rows if row["client10"] in part):
        text = " ".join(str(row["instruction"]).split())
        key = text.lower()
        if SHORTEST_CHARS <= len(text) <= REQUEST_CHARS and key not in found:
            place = int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13
            found[key] = Request(text, str(row["category"]), int(str(row["client10"])), place)
    return sorted(found.values(), key=lambda request: request.place)


def device_records(ordered: Sequence[Request]) -> Iterator[Record]:
    """Private requests of each device, split into train and heldout."""
    for client in DEVICE_CLIENTS:
        own = [request for request in ordered if request.client == client]
        heldout = [r for r in own if r.place < HELD_OUT_SHARE][:HELD_OUT_PER_DEVICE]
        train = [r for r in own if r.place >= HELD_OUT_SHARE][:TRAIN_PER_DEVICE]
        for split, chosen in (("train", train), ("heldout", heldout)):
            for r in chosen:
                yield {"text": r.text, "label": r.label, "client": client, "split": split}


def public_records(ordered: Sequence[Request]) -> Iterator[Record]:
    """Public requests, without their labels."""
    for request in [r for r in ordered if r.client in PUBLIC_CLIENTS][:PUBLIC_REQUESTS]:
        yield {"text": request.text}


def test_records(ordered: Sequence[Request]) -> Iterator[Record]:
    """The global test, and of client 9 as many of each label as keep the labels level."""
    taken: Counter[str] = Counter()
    for request in ordered:
        if request.client == TEST_CLIENTS[1]:
            taken[request.label] += 1
        if request.client == TEST_CLIENTS[0] or (
            request.client == TEST_CLIENTS[1] and taken[request.label] <= TEST_PER_LABEL
        ):
            yield {"text": request.text, "label": request.label}


def write(records: Iterable[Record], path: Path) -> None:
    """One JSON object per line, xz-compressed; the same records give the same bytes."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(lzma.compress(lines.encode(), preset=9))


def describe(slices: dict[str, list[Record]], folder: Path) -> str:
    """The README.md of the slices."""
    files = ["| file | rows | bytes | sha256 |", "| --- | --- | --- | --- |"]
    for name, records in slices.items():
        packed = (folder / name).read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        files.append(f"| `{name}` | {len(records):,} | {len(packed):,} | `{digest}` |")
    labels = sorted({str(record["label"]) for record in slices["dolly_test.jsonl.xz"]})
    columns = _columns(slices)
    counts = [f"| label | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    counts += [
        f"| {label} | " + " | ".join(str(counter[label]) for counter in columns.values()) + " |"
        for label in labels
    ]
    newline = "\n"
    return f"""# The demo's data

Slices of Dolly-15k (Databricks, 2023: requests written by its employees), over the ten clients of a
published non-IID split for federated instruction tuning. Licence: CC BY-SA 3.0, as the original.
This file and the slices are written by `python examples/data/make.py --data DATA`.

{newline.join(files)}

- `dolly_devices`: `text` (the instruction on one line), `label` (Dolly's category), `client`,
  `split`. Clients {_listed(DEVICE_CLIENTS)} play the devices, with at most {TRAIN_PER_DEVICE} train
  and {HELD_OUT_PER_DEVICE} heldout requests each. Private: only its own device may read a row.
- `dolly_public`: `text` of clients {_listed(sorted(PUBLIC_CLIENTS))}, without labels. The example
  models were pretrained on these requests, never on their labels.
- `dolly_test`: `text`, `label`. The split's global test, and client 9 with at most {TEST_PER_LABEL}
  per label. Nobody trains on it.

Kept are instructions of {SHORTEST_CHARS} to {REQUEST_CHARS} characters. No text (ignoring case and
spacing) occurs twice, within a file or between files. Order and splits follow the sha256 of the
text.

## Rows per label

{newline.join(counts)}

`corpus.py` describes the pretraining corpus, which is not kept here.
"""


def _listed(clients: Iterable[int]) -> str:
    return ", ".join(map(str, clients))


def _columns(slices: dict[str, list[Record]]) -> dict[str, Counter[str]]:
    columns: dict[str, Counter[str]] = {}
    for record in slices["dolly_devices.jsonl.xz"]:
        name = f"client {record['client']} {record['split']}"
        columns.setdefault(name, Counter())[str(record["label"])] += 1
    columns["test"] = Counter(str(record["label"]) for record in slices["dolly_test.jsonl.xz"])
    return columns


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 done, 1 refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder of the corpus files")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write; default: here")
    args = parser.parse_args(argv)
    source = next(file for file in PUBLIC.files if file.path == DOLLY)
    try:
        ordered = requests(read_rows(args.data, source))
    except CorpusError as refusal:
        print(refusal, file=sys.stderr)
        return 1
    slices = {
        "dolly_devices.jsonl.xz": list(device_records(ordered)),
        "dolly_public.jsonl.xz": list(public_records(ordered)),
        "dolly_test.jsonl.xz": list(test_records(ordered)),
    }
    for name, records in slices.items():
        write(records, args.out / name)
    (args.out / "README.md").write_text(describe(slices, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
