"""The programs of the benchmark and their arms. Does not know how an arm is run."""

from collections.abc import Sequence

from examples.learning.arms import BASELINES, CROSSLM_ARMS, FEDAVG_ARMS, Arm
from examples.learning.mkt_arms import FEDMKT_ARMS

PROGRAMS: dict[str, tuple[Arm, ...]] = {
    "fedavg": FEDAVG_ARMS,
    "crosslm": CROSSLM_ARMS,
    "fedmkt": FEDMKT_ARMS,
}


def arms_of(names: Sequence[str]) -> list[Arm]:
    """Every arm of the named programs, the baselines first."""
    return [*BASELINES, *(arm for name in names for arm in PROGRAMS[name])]
