"""Certificates from enrolment to revocation, against mosquitto as `broker config` makes it."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.authority import Authority
from edge_sdk.errors import LinkError, RemoteProtocolError
from edge_sdk.link.broker import find_mosquitto
from edge_sdk.link.certificate import BrokerCertificate
from edge_sdk.link.dial import dial
from edge_sdk.link.mqtt import MqttLink
from tests.torture.keys_world import command, until
from tests.torture.mutual_world import Town

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
    # paho leaves the socket of a failed handshake to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    made = Town(tmp_path_factory.mktemp("town"))
    yield made
    made.close()


def connects(link: MqttLink) -> bool:
    try:
        link.connect(wait_s=1.5)
    except LinkError:
        return False
    finally:
        link.close()
    return True


def test_a_device_enrols_by_password_and_returns_with_its_certificate(town: Town) -> None:
    with town.device("kitchen") as device:
        certificate = BrokerCertificate(town.folder / "kitchen")
        assert certificate.held
        assert (certificate.key_file.stat().st_mode & 0o777) == 0o600
        issued = x509.load_pem_x509_certificate(certificate.cert_file.read_bytes())
        assert [item.value for item in issued.subject] == ["kitchen"]
        left = issued.not_valid_after_utc - datetime.now(UTC)
        assert 29 <= left.days <= 30

        device.step()  # dials anew, with the certificate
        device.renew_keys()
        until(lambda: [t for w, t in town.tenant.counted if w == "kitchen" and "renew" in t], "it")

        assert device.config.link.broker == town.mutual
        assert device.status()["connected"]


def test_strangers_and_expired_certificates_are_not_let_in(town: Town, tmp_path: Path) -> None:
    def files(pair: tuple[bytes, bytes], name: str) -> tuple[Path, Path]:
        cert, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        cert.write_bytes(pair[0])
        key.write_bytes(pair[1])
        return cert, key

    own, now = town.desk.authority, time.time
    foreign = Authority(tmp_path, town.desk.store, tenant="x", days=30, now=now)
    good = files(own.client("attic"), "good")
    stranger = files(foreign.client("attic"), "stranger")
    expired = files(own.client("attic", days=-1.0), "expired")

    assert connects(town.link(*good, "attic"))
    assert not connects(town.link(*stranger, "attic"))
    assert not connects(town.link(*expired, "attic"))
    assert not connects(MqttLink(town.mutual, client_id="attic", ca=town.authority))
    assert not connects(
        MqttLink(town.mutual, client_id="attic", cert=str(good[0]), key=str(good[1]))
    )


def test_a_certificate_is_good_for_its_own_topics_and_name_alone(
    town: Town, tmp_path: Path
) -> None:
    files = {}
    for name in ("cellar", "garage"):
        files[name] = (tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        for path, data in zip(files[name], town.desk.authority.client(name), strict=True):
            path.write_bytes(data)
    heard: dict[str, list[bytes]] = {"cellar": [], "garage": []}
    garage = town.link(*files["garage"], "garage")
    garage.subscribe("v1/home/garage/down", lambda _, data: heard["garage"].append(data))
    garage.connect(wait_s=5.0)
    cellar = town.link(*files["cellar"], "garage")  # claims the other's client id
    cellar.subscribe("v1/home/garage/down", lambda _, data: heard["cellar"].append(data))
    cellar.connect(wait_s=5.0)

    cellar.publish("v1/home/garage/down", b"forged")
    cellar.publish("v1/home/garage/up", b"forged")
    town.tenant.link.publish("v1/home/garage/down", b"true")
    until(lambda: heard["garage"], "the coordinator's word")
    time.sleep(0.2)

    assert heard == {"cellar": [], "garage": [b"true"]}
    assert garage.connected
    assert garage.connections == 1  # was not thrown out by the one who claimed its name
    assert cellar.connected
    garage.close()
    cellar.close()


def test_a_revoked_device_is_put_out_and_stays_out(town: Town) -> None:
    with town.device("porch") as device:
        device.run_in_background()
        until(lambda: device.status()["connected"], "the connection with a certificate")
        began = time.monotonic()

        told = command("device", "revoke", "porch", "--config", town.file)
        until(lambda: not device.status()["connected"], "the end of the session", 10.0)
        took = time.monotonic() - began

        assert told["session"] == "ended"
        assert took < 10.0
        certificate = BrokerCertificate(town.folder / "porch")
        time.sleep(1.0)
        assert not device.status()["connected"]
        assert not connects(town.link(certificate.cert_file, certificate.key_file, "porch"))


def test_a_certificate_is_renewed_after_two_thirds_of_its_life(town: Town) -> None:
    with town.device("hall") as device:
        device.step()
        certificate = BrokerCertificate(town.folder / "hall")
        before = certificate.cert_file.read_bytes()
        member = device._member
        issued = member.time()
        assert not certificate.due(issued + 19 * 86_400, issued)
        assert certificate.due(issued + 21 * 86_400, issued)

        member._memory.remember("certificate-issued", b"")  # as if it had never been noted
        device._upkeep_due = 0.0
        until(lambda: device.step(0.05) >= 0 and certificate.cert_file.read_bytes() != before, "it")

        assert device.status()["connected"]
        assert certificate.cert_file.read_bytes().count(b"BEGIN CERTIFICATE") == 2


def test_tls_with_the_brokers_certificate_alone(town: Town) -> None:
    """The enrolment listener: passwords over TLS 1.3, its certificate verified."""
    made = command("device", "token", "--device", "shed", "--config", town.file)
    password = town.folder / "shed.password"
    password.write_text(made["broker_password"])
    files = {"password_file": str(password), "ca_file": town.authority}

    assert connects(dial(town.enrol, user="shed", **files))
    assert not connects(dial(town.enrol, user="shed", password_file=str(password)))
    in_ten_years = time.time() + 10 * 365 * 86_400
    assert connects(dial(town.enrol, user="shed", now=time.time, **files))
    assert not connects(dial(town.enrol, user="shed", now=lambda: in_ten_years, **files))


@pytest.mark.parametrize("what", ["noise", "another name"])
def test_only_a_devices_own_request_is_certified(town: Town, tmp_path: Path, what: str) -> None:
    request = BrokerCertificate(tmp_path).request("garage")

    with pytest.raises(RemoteProtocolError):
        town.desk.authority.certify("kitchen", b"noise" if what == "noise" else request)
