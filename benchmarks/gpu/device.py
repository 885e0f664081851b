# SPDX-License-Identifier: BSD-3-Clause

"""``python -m benchmarks.gpu.device``: which normfast is this, and does it see a device? The status says so.

Without one the tests would skip everything, which looks like success.
"""

from __future__ import annotations

import sys
from pathlib import Path

import normfast as nf


def main() -> int:
    config = nf.show_config("dicts")
    cuda = config["cuda"]
    seen = ", ".join(f"{d['name']} ({d['compute_capability']})" for d in cuda["devices"])
    what = seen if cuda["available"] else f"NONE: {cuda['reason']}"
    print(f"{what}; normfast {config['version']} in {Path(nf.__file__).parent}")
    return 0 if cuda["available"] else 1


if __name__ == "__main__":
    sys.exit(main())
