"""How settings become a link: one place where names, passwords and certificates meet a broker url.

Knows the settings that devices and coordinators share. Does not know what the link is used for.
"""

from collections.abc import Callable
from typing import Literal
from urllib.parse import quote

from edge_sdk.errors import ConfigError
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.store.settings import read_secret


def dial(
    broker: str,
    *,
    user: str,
    client_id: str = "",
    password_file: str = "",
    ca_file: str = "",
    cert_file: str = "",
    key_file: str = "",
    mqtt_version: Literal["5", "3.1.1"] = "5",
    now: Callable[[], float] | None = None,
) -> MqttLink:
    """Return a link to `broker` (mqtt[s]://host:port) as `user`, also the client id unless given.

    The broker takes the user for proven by the password or, over mqtts, by the certificate, whose
    common name must be `user`. A certificate and its key come together. With `now` the broker's own
    certificate is judged by that time instead of this machine's clock.

    Raises:
        ConfigError: a file cannot be read, TLS files without mqtts, or the url is wrong.
    """
    scheme, _, place = broker.partition("://")
    if scheme != "mqtts" and (ca_file or cert_file or key_file):
        raise ConfigError(
            f"{broker} does not use TLS but ca_file or a certificate is set; "
            "write mqtts://, or leave the files out"
        )
    if bool(cert_file) != bool(key_file):
        raise ConfigError("a broker certificate needs its key: set both cert_file and key_file")
    password = quote(read_secret(password_file), safe="")
    login = quote(user, safe="") + (f":{password}" if password else "")
    return MqttLink(
        f"{scheme}://{login}@{place}",
        client_id=client_id or user,
        ca=ca_file or None,
        cert=cert_file or None,
        key=key_file or None,
        mqtt_version=mqtt_version,
        now=now,
    )
