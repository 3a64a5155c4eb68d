"""One store, two connections of this process and a second process: nobody loses the log."""

import subprocess
import sys
from pathlib import Path

from edge_sdk.store.database import Database

MIB = 1024 * 1024
OTHER = """
import sys
from edge_sdk.store.database import Database
with Database(sys.argv[1], max_bytes=1 << 20) as other:
    with other.transaction() as db:
        db.execute("INSERT INTO t VALUES (2)")
"""


def test_opening_a_store_twice_keeps_the_locks_of_the_first(tmp_path: Path) -> None:
    """Closing a descriptor of a database file drops all POSIX locks of the process on it."""
    path = tmp_path / "store.db"
    with Database(path, max_bytes=MIB) as first:
        first.create("CREATE TABLE t (x INTEGER)")
        with first.transaction() as db:
            db.execute("INSERT INTO t VALUES (1)")
        Database(path, max_bytes=MIB).close()

        subprocess.run([sys.executable, "-c", OTHER, str(path)], check=True)

        assert (tmp_path / "store.db-wal").exists()  # ours: the other must not have removed it
        with first.transaction() as db:
            db.execute("INSERT INTO t VALUES (3)")
    with Database(path, max_bytes=MIB) as again, again.transaction() as db:
        assert [x for (x,) in db.execute("SELECT x FROM t ORDER BY x")] == [1, 2, 3]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
