"""The fallback broker: amqtt in a process of its own, bound to loopback, with our access rules.

Run as `python -m edge_sdk.link.amqtt_broker FOLDER PORT` by broker.py; it prints its port once it
listens and ends when its standard input closes, so it never outlives the process that started it.
For development and demos: MQTT 3.1.1 only, and it forgets everything when it ends.
"""

import asyncio
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amqtt.broker import Broker
from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin

from edge_sdk.link.passwords import check_password, may_read, may_write, read_password_file

LOOK_S = 0.5
"""How often the password file is looked at for users who may not stay."""
_HERE = "edge_sdk.link.amqtt_broker"


class PasswordPlugin(BaseAuthPlugin):
    """Only users of the password file, and only under a client id that is their own name."""

    @dataclass
    class Config:
        """Where the passwords are."""

        password_file: str = ""

    async def authenticate(self, *, session: Any) -> bool:
        """Whether this connection may stay; the file is read anew, so new users need no restart."""
        user = session.username or ""
        hashed = read_password_file(Path(self.config.password_file)).get(user)
        if hashed is None or not check_password(session.password or "", hashed):
            return False
        return bool(session.client_id == user)  # or it could end another device's session


class TopicPlugin(BaseTopicPlugin):
    """The access rules of passwords.py, asked on publish, on subscribe and on delivery."""

    async def topic_filtering(
        self, *, session: Any = None, topic: str | None = None, action: Any = None
    ) -> bool:
        """Whether this session may do `action` on `topic`."""
        if session is None or session.username is None or topic is None:
            return False
        rule = may_write if action == Action.PUBLISH else may_read
        return rule(session.username, topic)


async def _serve(folder: Path, port: int) -> None:
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {
            f"{_HERE}.PasswordPlugin": {"password_file": str(folder / "passwords")},
            f"{_HERE}.TopicPlugin": {},
        },
    }
    broker = Broker(config)
    await broker.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    watching = asyncio.create_task(_throw_out(broker, folder / "passwords"))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    watching.cancel()
    await broker.shutdown()


async def _throw_out(broker: Broker, passwords: Path) -> None:
    """End the sessions of users who are no longer in the password file, as mosquitto does."""
    seen = 0
    while True:
        await asyncio.sleep(LOOK_S)
        changed = passwords.stat().st_mtime_ns
        if changed == seen:
            continue
        seen, allowed = changed, read_password_file(passwords)
        for session, handler in list(broker.sessions.values()):
            if session.username not in allowed:
                await handler.handle_connection_closed()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))
