"""Makes certificates of several optimizers in one process that has imported all they need.

certify.py ORDERS.json OUT: ORDERS holds for each optimizer its flags, its cases, and whether runs are resumed.
OUT/NAME.json is what was found.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from panda.testing.optimizers import Case
from panda.testing.optimizers import certificate

out = Path(sys.argv[2])
for name, order in json.loads(Path(sys.argv[1]).read_text()).items():
    folder = out / name
    folder.mkdir()
    cases = [Case(*case) for case in order["cases"]]
    found = certificate(name, order["flags"], folder, cases=cases, resuming=order["resuming"])
    (out / f"{name}.json").write_text(json.dumps(asdict(found)))
