"""Every error Symbiont raises, in one tree; each says who is at fault and whether waiting helps.

FleetError
+-- ConfigError              the operator: a file, key or value; fix it, waiting does not help
+-- DataError                the operator: a data set that cannot be used; fix it
+-- LinkError                the network: unreachable or cut; wait, the outbox keeps everything
+-- StorageError             this machine: disk full or store damaged; free space, then go on
|   +-- Postponed              this machine is busy or on battery; the task is tried again by itself
+-- ProtocolError
|   +-- LocalProtocolError     our own caller broke the order of messages; a bug on this side
|   +-- RemoteProtocolError    the peer sent something malformed or out of order; refuse it
+-- SealError                a message that did not authenticate; one sentence, no detail
+-- EnrolmentError           the enrolment code is wrong, used, expired or for someone else
+-- TrustError               a release that must not be run
|   +-- SignatureError         not signed by the owner
|   +-- RollbackError          older than the one already held
|   +-- DigestError            the bytes are not the bytes that were signed
+-- QuorumMissed             too few useful replies before the deadline; retry, skip or stop
+-- ExportError              the exported model does not agree with the trained one
+-- RuntimeFailure           a request the device's model cannot serve
    +-- Lacking                it could with what the sender has; the attribute says what
"""


class FleetError(Exception):
    """Base of all errors raised by Symbiont."""


class ConfigError(FleetError):
    """A configuration file, key or value is wrong; the message names it and the allowed range."""


class DataError(FleetError):
    """A data set is missing, empty, altered or not readable as text."""


class LinkError(FleetError):
    """The broker cannot be reached or cut the connection; retrying later helps."""


class StorageError(FleetError):
    """The local store refused a write, most often because the disk is full."""


class Postponed(StorageError):  # noqa: N818 - nothing went wrong
    """Not now: the device's own policy asks to wait. Like a full disk it loses nothing: the task
    stays unread and is tried again."""


class ProtocolError(FleetError):
    """The rules of the wire were broken; the two subclasses say by whom."""


class LocalProtocolError(ProtocolError):
    """This side tried an illegal step; always a bug of the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something malformed, foreign or out of order."""


class SealError(FleetError):
    """A sealed message failed to authenticate. Deliberately without detail."""

    def __init__(self) -> None:
        super().__init__("the sealed message could not be authenticated")


class EnrolmentError(FleetError):
    """An enrolment code was refused: wrong, used, expired or meant for another device."""


class TrustError(FleetError):
    """A release must not be run; the subclasses say why."""


class SignatureError(TrustError):
    """A release is not signed by the keys this device trusts."""


class RollbackError(TrustError):
    """A release is older than the one this device already holds."""


class DigestError(TrustError):
    """A file's bytes differ from those that were signed."""


class QuorumMissed(FleetError):  # noqa: N818 - named as the event it is, not as a fault
    """Fewer than the needed replies arrived before the deadline; `answered` are who did answer."""

    def __init__(self, message: str, answered: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.answered = answered


class ExportError(FleetError):
    """An exported model disagrees with the trained one, or cannot be exported."""


class RuntimeFailure(FleetError):  # noqa: N818 - RuntimeError is taken by the language
    """A request the device's model cannot serve; the session stays usable."""


class Lacking(RuntimeFailure):
    """A task needs what this device does not hold; asked again with it, the device can do it.

    Attributes:
        lacks: words of `Refused.lacks`.
    """

    def __init__(self, message: str, *lacks: str) -> None:
        super().__init__(message)
        self.lacks = lacks
