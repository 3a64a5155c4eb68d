"""What may leave: every kind a device sends is explained, every field says what it tells."""

from typing import get_args

from edge_sdk import leaving
from edge_sdk.wire import messages

FROM_THE_COORDINATOR = {
    "TrainAdapter", "Score", "TopLogits", "OfferModel", "OfferData", "File", "Enrolled", "Renewed",
    "TeachAdapter", "Verified",
}  # fmt: skip


def test_every_kind_that_a_device_may_send_is_explained() -> None:
    kinds = {kind.__name__ for kind in get_args(messages.AnyMessage)}
    assert kinds - FROM_THE_COORDINATOR == {kind.__name__ for kind in leaving.DEVICE_KINDS}


def test_every_field_has_a_meaning() -> None:
    fields = {name for kind in leaving.DEVICE_KINDS for name in kind.__struct_fields__}
    assert fields == set(leaving.MEANINGS)


def test_nothing_sent_yet_is_said_to_be_possible() -> None:
    rows = leaving.explain_all([], [], to="coordinator", key="k")
    assert {row.state for row in rows} == {"possible"}
    assert all(row.meaning and row.bytes == 0 and row.to == "coordinator" for row in rows)
