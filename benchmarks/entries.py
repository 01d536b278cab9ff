"""What is recorded, from a seed or from real input: all contenders get the same."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

SIZES = {"100 B": 100, "500 B": 500, "4 KB": 4_000}
"""What a caller gives, as JSON; the line around it adds some 300 bytes."""
REAL = Path(__file__).parent.parent / "tests" / "data" / "k8s-audit-events.ndjson"
MIX = "real mix"
SEED = 35


def entries(kind: str, count: int = 64) -> list[Entry]:
    """Return entries of a kind: a name in `SIZES`, or `MIX` for events of Kubernetes servers."""
    if kind == MIX:
        events = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
        return [_from_event(event) for event in events]
    chance = random.Random(SEED)
    return [_made_up(chance, SIZES[kind]) for _ in range(count)]


def _made_up(chance: random.Random, size: int) -> Entry:
    entry: Entry = {"action": "InvoiceDelete", "user_id": str(chance.randrange(10_000))}
    data: dict[str, Any] = {"invoiceId": f"inv_{chance.randrange(10**6)}"}
    entry["data"] = data
    if size > 200:
        entry.update(company_id=str(chance.randrange(10_000)), client_ip="192.0.2.137", type="REST")
        data.update(method="DELETE", status=204, url=f"/invoices/{data['invoiceId']}")
    while len(json.dumps(entry)) < size - 60:
        data[f"field{len(data)}"] = "".join(chance.choices(string.ascii_lowercase + " ", k=40))
    data["rest"] = "x" * max(0, size - len(json.dumps(entry)) - 12)
    return entry


def _from_event(event: Entry) -> Entry:
    user = event["user"]["username"]
    addresses = event.get("sourceIPs") or [None]
    resource = event.get("objectRef", {}).get("resource", "unknown")
    rest = {key: value for key, value in event.items() if key != "verb"}
    return {
        "action": resource.capitalize() + event["verb"].capitalize(),
        "user_id": user,
        "client_ip": addresses[-1],
        "type": "REST",
        "data": rest,
    }
