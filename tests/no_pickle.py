"""B12: an alarm that rings when any code of ours lets something be unpickled.

Knows the interpreter's audit events. Does not know which library asked: `torch.load` without
`weights_only`, `numpy.load(allow_pickle=True)`, joblib and plain pickle all raise the same event
when they look up a class or function, which is the step that makes a pickle dangerous.
"""

import sys
import traceback
from types import FrameType

EVENT = "pickle.find_class"
OURS = ("edge_sdk.", "coordinator.", "compression.", "exporters.", "examples.")


class PickleAlarm:
    """Audit hooks cannot be taken out again, so this one is switched on and off."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if event != EVENT or not self.on:
            return
        ours = _nearest_of_ours(sys._getframe(1))
        if ours is not None:
            what = ".".join(map(str, args))
            self.calls.append(f"{ours} let {what} be unpickled")
            raise RuntimeError(f"unpickling {what} under {ours}: pickles are not read (B12)")


def _nearest_of_ours(frame: FrameType | None) -> str | None:
    for step, _ in traceback.walk_stack(frame):
        name = step.f_globals.get("__name__", "")
        if name.startswith(OURS):
            return f"{name}:{step.f_lineno}"
    return None


ALARM = PickleAlarm()
"""The one that `tests/conftest.py` switches on."""
