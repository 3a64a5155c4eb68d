"""What a device does with each message: the task in, the replies and what to remember out.

Knows which desk carries out which message, and what of a failure may be told. Does not know links,
seals or the mailbox: the caller stores `Handled` in one transaction, so a task is done once however
often it is begun.

Privacy is decided here and at the two desks: a reply is built field by field from figures and
factors, and a refusal never quotes an example, a label of one, or a path of this machine.
"""

import logging
from datetime import datetime
from typing import TYPE_CHECKING

from edge_sdk.collect import ExampleStore
from edge_sdk.config import EdgeConfig
from edge_sdk.errors import DataError, FleetError, StorageError
from edge_sdk.handled import OFFER, Event, Handled, Recall
from edge_sdk.lesson_tasks import LessonDesk
from edge_sdk.model_tasks import ModelDesk
from edge_sdk.models import ModelStore
from edge_sdk.train.policy import Policy
from edge_sdk.wire.messages import (
    AnyMessage,
    File,
    OfferData,
    OfferModel,
    Refused,
    Score,
    TeachAdapter,
    TextTask,
    TopLogits,
    TrainAdapter,
)

if TYPE_CHECKING:
    from edge_sdk.encoders import EncoderSession
    from edge_sdk.runtime import SlmSession

__all__ = ["Event", "Handled", "TaskDesk"]

logger = logging.getLogger(__name__)


class TaskDesk:
    """Carries out one message at a time for one device."""

    def __init__(
        self,
        config: EdgeConfig,
        *,
        task: TextTask,
        examples: ExampleStore,
        models: ModelStore,
        recall: Recall,
        on_event: Event | None = None,
        policy: Policy | None = None,
    ) -> None:
        """`recall` returns what was remembered under a name, b"" for nothing; `policy` is asked
        between the steps of a training (default: as configured)."""
        self._config = config
        self._tell = on_event or (lambda event: None)
        self._models = ModelDesk(
            config, task=task, examples=examples, models=models, recall=recall, tell=self._tell
        )
        self._learning = LessonDesk(
            config,
            task=task,
            examples=examples,
            models=self._models,
            recall=recall,
            tell=self._tell,
            policy=policy,
        )

    @property
    def session(self) -> "SlmSession | EncoderSession | None":
        """The open model, None before the first release."""
        return self._models.session

    def open_current(self) -> None:
        """Open the release that runs, or the one before it if that fails; nothing if none is held.

        Raises:
            RuntimeFailure: neither can be opened.
        """
        self._models.open_current()

    def close(self) -> None:
        """Close the open model."""
        self._models.close()

    def handle(self, message: AnyMessage, *, now: datetime) -> Handled:
        """Carry out `message`; what this device cannot or will not do becomes Refused.

        Raises:
            StorageError: this machine's disk refused, or training is put off (Postponed); the
                message should be tried again later.
        """
        task_id, lacks = getattr(message, "task_id", ""), ()
        self._tell({"event": "task", "kind": type(message).__name__, "task": task_id})
        try:
            return self._carry_out(message, now)
        except StorageError:
            raise
        except DataError as exc:
            logger.warning("task %s refused: %s", task_id, exc)
            reason = "this device's examples do not serve the task; its own log says why"
        except FleetError as exc:
            reason = self._without_paths(str(exc))
            lacks = getattr(exc, "lacks", ())
        except (MemoryError, RuntimeError) as exc:
            # torch reports exhausted memory as a RuntimeError; its text may quote tensors.
            logger.exception("task %s failed", task_id)
            reason = f"the task failed on this device ({type(exc).__name__}); its own log says why"
        self._tell({"event": "refused", "task": task_id, "reason": reason})
        forget = {OFFER: b""} if isinstance(message, OfferModel | File) else {}
        return Handled((Refused(task_id, reason[:65_536], lacks),), forget)

    def _carry_out(self, message: AnyMessage, now: datetime) -> Handled:
        match message:
            case OfferModel():
                return self._models.offer(message, now)
            case File():
                return self._models.file(message, now)
            case OfferData():
                return self._learning.data(message)
            case TrainAdapter():
                return self._learning.train(message)
            case Score():
                return self._learning.score(message)
            case TopLogits():
                return self._learning.top_logits(message)
            case TeachAdapter():
                return self._learning.teach(message)
            case _:
                logger.warning("a %s is not for a device; ignored", type(message).__name__)
                return Handled()

    def _without_paths(self, reason: str) -> str:
        return reason.replace(self._config.device.state_dir, "(state)")
