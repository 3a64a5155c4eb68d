"""A coordinator's service as a process of its own, to be killed: prints every event.

Usage: python fedmkt_process.py COORDINATOR_TOML BROKER_URL MQTT_VERSION
"""

import sys

import torch

from coordinator.service import Service
from edge_sdk.link.mqtt import MqttLink


def main(path: str, url: str, version: str) -> None:
    torch.set_num_threads(1)
    link = MqttLink(url, mqtt_version=version)  # type: ignore[arg-type]
    with Service.from_config(path, link=link, stream=sys.stdout) as service:
        service.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
