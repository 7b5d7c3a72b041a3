"""The compute node's side of labctl: load an engine once, measure each run, write each record.

This package is copied to the node and runs in the partition's own Python, so it imports the standard library alone
(Python 3.10 or later); torch, transformers and vllm are imported by the engine that needs them, when it needs them.
"""

import sys
from pathlib import Path

from labctl_workers.record import NODE_PACKAGES_FOLDER

_brought = Path(__file__).parent.parent / NODE_PACKAGES_FOLDER
if _brought.is_dir() and str(_brought) not in sys.path:
    sys.path.append(str(_brought))  # last: the node's own packages go before it
