"""B7: one code, a hundred devices at once: exactly one gets in; bad codes let nobody in.

Knows the tenant without models over the in-memory broker, so that a hundred couriers fit. The
contenders are in a race for one row: their requests are on the way before any is decided.
"""

import threading
from pathlib import Path

import msgspec

from edge_sdk.errors import EnrolmentError, FleetError
from edge_sdk.link.memory import MemoryBroker
from edge_sdk.wire.enrolment import EnrolmentCode
from tests.torture.keys_world import Device, Tenant
from tests.torture.result import Result, Scale, say


def run(scale: Scale, seed: int, folder: Path) -> Result:
    """Hold the races; see the module's text."""
    contenders, races = (100, 2) if scale is Scale.FULL else (12, 1)
    broker = MemoryBroker()
    tenant = Tenant(folder / "cloud", broker.link("coordinator")).start()
    other = Tenant(folder / "other", broker.link("coordinator"), name="office").start()
    winners: list[int] = []
    try:
        for race in range(races):
            winners.append(_race(tenant, broker, folder / f"race-{race}", race, contenders))
            say("B7", f"race {race + 1}: {winners[-1]} of {contenders} won")
        bad = _bad_codes(tenant, other, broker, folder)
        say("B7", f"bad codes: {bad}")
        enrolled = [device.device for device in tenant.desk.fleet.list()]
    finally:
        tenant.close()
        other.close()
    return Result(
        code="B7",
        title="enrolment race",
        value={"winners": winners, "bad_codes_let_in": sum(bad.values())},
        unit="devices let in",
        goal="exactly 1 of 100 wins; expired, wrong tenant, wrong serial: 0",
        passed=winners == [1] * races and not any(bad.values()) and len(enrolled) == races + 1,
        notes={"contenders": contenders, "bad_codes": bad},
    )


def _race(tenant: Tenant, broker: MemoryBroker, folder: Path, number: int, contenders: int) -> int:
    """How many of the contenders got in with one code."""
    code = tenant.code(f"prize-{number}")
    barrier = threading.Barrier(contenders)
    won: list[bytes] = []
    failures: list[BaseException] = []
    devices = [Device(folder / str(i), broker.link(code.device)) for i in range(contenders)]

    def contend(device: Device) -> None:
        barrier.wait()
        try:
            device.ask(code, timeout_s=60.0)
            won.append(device.member.ring.public.sign)
        except EnrolmentError:
            pass
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=contend, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device in devices:
        device.close()
    if failures:
        raise failures[0]
    found = tenant.desk.fleet.lookup(code.device)
    assert found is not None
    assert found.sign in won
    return len(won)


def _bad_codes(tenant: Tenant, other: Tenant, broker: MemoryBroker, folder: Path) -> dict[str, int]:
    """How many devices each kind of bad code let in."""
    good = tenant.code("kitchen")
    spent = tenant.code("spent")
    first = Device(folder / "first", broker.link("spent"))
    first.enrol(spent)
    first.close()
    tenant.desk.revoke("spent")
    codes: dict[str, EnrolmentCode] = {
        "expired": tenant.code("late", lasts_s=1e-3),
        "used": spent,
        "wrong tenant": msgspec.structs.replace(
            other.code("kitchen"), tenant="home", root_key_hash=good.root_key_hash
        ),
        "other tenant's topics": msgspec.structs.replace(
            good, tenant="office", root_key_hash=other.code("x").root_key_hash
        ),
        "wrong root": msgspec.structs.replace(good, root_key_hash=bytes(32)),
        "wrong serial": msgspec.structs.replace(good, device="garage"),
        "wrong secret": msgspec.structs.replace(good, secret=bytes(16)),
        "unknown": msgspec.structs.replace(good, token_id="t-none"),
    }
    let_in = {}
    for number, (what, code) in enumerate(codes.items()):
        device = Device(folder / f"bad-{number}", broker.link(code.device))
        try:
            device.enrol(code, timeout_s=10.0)
            let_in[what] = 1
        except EnrolmentError:
            let_in[what] = 0
        except FleetError as exc:
            raise AssertionError(f"{what}: {exc}") from exc
        finally:
            device.close()
    return let_in
