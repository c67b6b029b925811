"""What a running yard of 268cc56 answers on its control socket, as JSON: its status, and the lines of each order.

Run by `make.sh`, in the environment of 268cc56.
"""

import json
import sys

import httpx

from engines.home import home
from engines.yard.client import short_name, socket_path

MODEL, TO = "smollm2", "mistral.rs"
ORDERS = [
    ("canary", {"model": MODEL, "to": TO, "weight": 0.5}),
    ("canary", {"model": MODEL, "to": TO, "weight": 0}),
    ("shadow", {"model": MODEL, "to": TO, "share": 0.5}),
    ("shadow", {"model": MODEL, "to": TO, "share": 0}),
    ("use", {"model": MODEL, "engine": "auto"}),
    ("drain", {"model": MODEL, "on": True}),
    ("drain", {"model": MODEL, "on": False}),
    ("unload", {"model": MODEL}),
    ("load", {"model": MODEL}),
    ("reload", {}),
    ("promote", {"model": MODEL, "to": TO, "form": "auto"}),
    ("rollback", {"model": MODEL, "form": "auto"}),
    ("promote", {"model": MODEL, "to": TO, "form": "auto"}),
    ("retire", {"engine": "llama.cpp", "who": "Ada", "why": "recorded", "archive": "/home/ada/archive"}),
    ("restore", {"engine": "llama.cpp"}),
    ("stop", {}),
]


def main() -> None:
    """Print them; of an order that is given twice, the first answer."""
    orders: dict[str, list[dict[str, object]]] = {}
    with short_name(socket_path(home())) as name:
        transport = httpx.HTTPTransport(uds=name, verify=False)
        with httpx.Client(transport=transport, base_url="http://yard", timeout=600) as yard:
            status = yard.get("/status").json()
            for order, body in ORDERS:
                lines = [json.loads(line) for line in yard.post(f"/{order}", json=body).text.splitlines()]
                if "done" not in lines[-1]:
                    sys.exit(f"{order}: {lines}")
                orders.setdefault(order, lines)
    json.dump({"status": status, "orders": orders}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
