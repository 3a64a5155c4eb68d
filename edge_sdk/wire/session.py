"""The legal order of messages, as one table that both sides use.

Knows who may say what after what. Does not know contents, transfers, time or storage.

Theory. A device and the coordinator hold many conversations at once, one per task, each opened by
one side and ended by the other's answer. A conversation is in one state; a message moves it to the
next, and the table below lists every move there is. OPEN is before the first word and CLOSED after
the last; a closed conversation is forgotten, since the mailbox already refuses a second message of
a kind for a task. A move that is not in the table is our own bug when we are about to send it
(LocalProtocolError), and the peer's fault when it arrives (RemoteProtocolError).

Two rules about the table: a state is named after what is going on, not after the last message; and
nothing is decided here that needs a message's fields.
"""

from enum import StrEnum

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.wire import messages
from edge_sdk.wire.messages import AnyMessage

MAX_CONVERSATIONS = 4096
"""Per peer; a peer that opens more and answers none is refused."""


class Role(StrEnum):
    """Who speaks."""

    COORDINATOR = "coordinator"
    DEVICE = "device"


class State(StrEnum):
    """What goes on in one conversation."""

    OPEN = "open"
    ENROLLING = "enrolling"
    RENEWING = "renewing"
    TRAINING = "training"
    SCORING = "scoring"
    TELLING = "telling"
    OFFERING = "offering"
    FETCHING = "fetching"
    VERIFYING = "verifying"
    DRAFTING = "drafting"
    CLOSED = "closed"


Moves = dict[State, dict[Role, dict[type[messages.Message], State]]]

LEGAL: Moves = {
    State.OPEN: {
        Role.DEVICE: {
            messages.Enrol: State.ENROLLING,
            messages.RenewKeys: State.RENEWING,
            messages.VerifyDraft: State.VERIFYING,
        },
        Role.COORDINATOR: {
            messages.TrainAdapter: State.TRAINING,
            messages.Score: State.SCORING,
            messages.TopLogits: State.TELLING,
            messages.TeachAdapter: State.TRAINING,
            messages.OfferModel: State.OFFERING,
            messages.OfferData: State.CLOSED,  # nothing to answer: Done says it arrived
        },
    },
    State.ENROLLING: {Role.COORDINATOR: {messages.Enrolled: State.CLOSED}},
    State.RENEWING: {Role.COORDINATOR: {messages.Renewed: State.CLOSED}},
    State.TRAINING: {
        Role.DEVICE: {messages.AdapterUpdate: State.CLOSED, messages.Refused: State.CLOSED}
    },
    State.SCORING: {Role.DEVICE: {messages.Scores: State.CLOSED, messages.Refused: State.CLOSED}},
    State.TELLING: {
        Role.DEVICE: {messages.LogitRows: State.CLOSED, messages.Refused: State.CLOSED}
    },
    State.OFFERING: {
        Role.DEVICE: {
            messages.WantFiles: State.FETCHING,
            messages.ModelReport: State.CLOSED,  # it held every file already
            messages.Refused: State.CLOSED,
        }
    },
    State.FETCHING: {
        Role.COORDINATOR: {messages.File: State.FETCHING},
        Role.DEVICE: {
            messages.WantFiles: State.FETCHING,  # some were damaged
            messages.ModelReport: State.CLOSED,
            messages.Refused: State.CLOSED,
        },
    },
    State.VERIFYING: {
        Role.COORDINATOR: {messages.Verified: State.DRAFTING, messages.Refused: State.CLOSED}
    },
    State.DRAFTING: {
        Role.DEVICE: {messages.VerifyDraft: State.VERIFYING},
        Role.COORDINATOR: {messages.Refused: State.CLOSED},  # forgotten: its time was over
    },
}


def conversation_of(message: AnyMessage) -> str:
    """Return the conversation a message belongs to: its task, or the one enrolment."""
    return getattr(message, "task_id", "") or "enrolment"


class Session:
    """The conversations between `me` and one peer."""

    def __init__(self, me: Role) -> None:
        self.me = me
        self.peer = Role.DEVICE if me is Role.COORDINATOR else Role.COORDINATOR
        self._states: dict[str, State] = {}

    def state(self, conversation: str) -> State:
        """Return the state of a conversation; OPEN when it has not begun or is over."""
        return self._states.get(conversation, State.OPEN)

    def send(self, message: AnyMessage) -> State:
        """Note a message this side is about to send, and return the state after it.

        Raises:
            LocalProtocolError: it may not be sent now.
        """
        after = self._after(self.me, message)
        if after is None:
            raise LocalProtocolError(self._fault(self.me, message))
        return self._enter(message, after)

    def receive(self, message: AnyMessage) -> State:
        """Note a message of the peer, and return the state after it.

        Raises:
            RemoteProtocolError: the peer may not send it now, or has opened too many conversations.
        """
        after = self._after(self.peer, message)
        if after is None:
            raise RemoteProtocolError(self._fault(self.peer, message))
        begins = after is not State.CLOSED and conversation_of(message) not in self._states
        if begins and len(self._states) >= MAX_CONVERSATIONS:
            raise RemoteProtocolError(
                f"the peer has {len(self._states)} unanswered tasks, the limit; answer some first"
            )
        return self._enter(message, after)

    def _after(self, speaker: Role, message: AnyMessage) -> State | None:
        moves = LEGAL[self.state(conversation_of(message))]
        return moves.get(speaker, {}).get(type(message))

    def _enter(self, message: AnyMessage, after: State) -> State:
        if after is State.CLOSED:
            self._states.pop(conversation_of(message), None)
        else:
            self._states[conversation_of(message)] = after
        return after

    def _fault(self, speaker: Role, message: AnyMessage) -> str:
        conversation = conversation_of(message)
        return (
            f"the {speaker} may not say {type(message).__name__} in task {conversation}, which is "
            f"{self.state(conversation)}"
        )


def table_as_markdown() -> str:
    """Return LEGAL as a Markdown table, as `edge_sdk/wire/README.md` shows it."""
    rows = ["| state | who | says | then |", "|---|---|---|---|"]
    rows += [
        f"| {state} | {role} | {kind.__name__} | {after} |"
        for state, roles in LEGAL.items()
        for role, moves in roles.items()
        for kind, after in moves.items()
    ]
    return "\n".join(rows)
