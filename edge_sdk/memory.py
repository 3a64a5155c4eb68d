"""What a device remembers between tasks: named bytes in the mailbox's own file.

Knows one small table. Does not know what the values mean. Sharing the mailbox's file lets "the
reply is in the outbox" and "this is what it changed" be one step.
"""

from edge_sdk.store.mailbox import Mailbox

_TABLE = "CREATE TABLE IF NOT EXISTS remembered (name TEXT PRIMARY KEY, value BLOB NOT NULL)"


class DeviceMemory:
    """Durable bytes by name; joins the mailbox's open transaction if there is one."""

    def __init__(self, mailbox: Mailbox) -> None:
        """Use `mailbox`'s file.

        Raises:
            StorageError: the file refuses.
        """
        self._mailbox = mailbox
        mailbox.create(_TABLE)

    def recall(self, name: str) -> bytes:
        """Return what is remembered under `name`, b"" for nothing.

        Raises:
            StorageError: the file refuses.
        """
        with self._mailbox.transaction() as rows:
            found = rows.execute("SELECT value FROM remembered WHERE name = ?", (name,)).fetchone()
        return bytes(found[0]) if found else b""

    def remember(self, name: str, value: bytes) -> None:
        """Keep `value` under `name`; b"" forgets.

        Raises:
            StorageError: the file refuses; the old value stays.
        """
        with self._mailbox.transaction() as rows:
            if value:
                rows.execute("INSERT OR REPLACE INTO remembered VALUES (?, ?)", (name, value))
            else:
                rows.execute("DELETE FROM remembered WHERE name = ?", (name,))
