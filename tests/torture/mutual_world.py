"""A broker with mutual TLS as `symbiont broker config` makes it, its coordinator and real devices.

Knows the commands and the tenant without models. Needs mosquitto.
"""

import subprocess
from pathlib import Path

from coordinator.config import CoordinatorConfig
from edge_sdk.agent import EdgeDevice
from edge_sdk.config import EdgeConfig
from edge_sdk.link.broker import find_mosquitto
from edge_sdk.link.dial import dial
from edge_sdk.link.mqtt import MqttLink
from edge_sdk.wire.config_rules import parse_toml
from tests.torture.keys_world import SETTINGS, Tenant, command, free_port, until


class Town:
    """A broker with mutual TLS, a coordinator that uses it, and the operator's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "coordinator.toml"
        self._settings("")
        made = command(
            *("broker", "config", "--mtls", "--host", "localhost", "--out", folder / "broker"),
            *("--port", free_port(), "--enrol-port", free_port(), "--config", self.file),
        )
        self.mutual, self.enrol = made["urls"]
        self.authority = str(folder / "broker" / "authority.pem")
        settings = {key.removeprefix("service."): value for key, value in made["settings"].items()}
        self._settings("\n".join(f'{key} = "{value}"' for key, value in settings.items()))
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(find_mosquitto()), "-c", made["config"]], stderr=log
            )
        until(lambda: (folder / "broker" / "mosquitto.pid").exists(), "the broker")
        config = CoordinatorConfig.load(self.file)
        service = config.service
        link = dial(
            service.broker,
            user="coordinator",
            ca_file=service.ca_file,
            cert_file=service.cert_file,
            key_file=service.key_file,
        )
        self.tenant = Tenant(folder, link, config=config).start()
        self.desk = self.tenant.desk

    def _settings(self, more: str) -> None:
        cloud = self.folder / "cloud"
        text = SETTINGS.format(tenant="home", folder=cloud, enrolment="token", more=more)
        self.file.write_text(text)

    def device(self, name: str) -> EdgeDevice:
        """An enrolled device that shows its certificate."""
        made = command("device", "token", "--device", name, "--config", self.file)
        password = self.folder / f"{name}.password"
        password.write_text(made["broker_password"])
        overrides = {
            "device.state_dir": str(self.folder / name),
            "link.broker": self.mutual,
            "link.enrol_broker": self.enrol,
            "link.password_file": str(password),
            "link.ca_file": self.authority,
            "link.mutual_tls": True,
        }
        device = EdgeDevice(parse_toml("", EdgeConfig, "test", overrides=overrides))
        device.enrol(made["code"], timeout_s=20.0)
        return device

    def link(self, cert: Path | str, key: Path | str, name: str, **more: object) -> MqttLink:
        """A link with somebody's certificate."""
        options = {"ca": self.authority, "first_retry_s": 0.1, "last_retry_s": 0.2, **more}
        return MqttLink(self.mutual, client_id=name, cert=str(cert), key=str(key), **options)  # type: ignore[arg-type]

    def close(self) -> None:
        self.tenant.close()
        self._process.terminate()
        self._process.wait()
