"""Rates and overheads measured on a device, from a file that a benchmark wrote; the data sheet's where there
is none.

    {"device": "cpu", "dtype": "float32", "source": "...", "rates": {"flops": 9e10, ...}, "process_gib":
    {"actor": 0.4}}
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from orchestrator.plan.devices import GIB, Device
from orchestrator.plan.memory import Overheads
from orchestrator.plan.service import Rates, sheet_rates

SHIPPED = Path(__file__).parent / "calibrations"


def read_calibration(file: Path | None, device: Device, dtype: str) -> tuple[Rates, Overheads]:
    """``file`` None: the one that came with Quartet for this device and dtype, if any. ValueError for a file
    that cannot be read or is of another device."""
    if file is None:
        file = SHIPPED / f"{device.name.lower()}_{dtype}.json"
        if not file.exists():
            return sheet_rates(device, dtype), Overheads()
    try:
        tree = json.loads(file.read_text())
        names = {field.name for field in fields(Rates)} - {"source"}
        rates = Rates(source=str(tree["source"]), **{name: float(tree["rates"][name]) for name in names})
        process = {role: float(gib) * GIB for role, gib in tree["process_gib"].items()}
        measured_on = (str(tree["device"]), str(tree["dtype"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--calibration={file} is no calibration ({error!r}); benchmarks/plan_score.py fit writes one"
        ) from error
    if measured_on != (device.name, dtype):
        raise ValueError(
            f"--calibration={file} was measured on {measured_on[0]} in {measured_on[1]}, the plan is for "
            f"{device.name} in {dtype}; give one of that device, or none for its data sheet"
        )
    return rates, Overheads(process={**Overheads().process, **process}, measured=True)
