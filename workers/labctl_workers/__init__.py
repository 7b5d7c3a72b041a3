"""The compute node's side of labctl: load an engine, measure each run, write each record.

A copy of this package runs in the partition's own Python, so it imports the standard library alone (Python 3.10 or later).
Each engine imports torch, transformers or vLLM when it loads.
"""

import sys
from pathlib import Path

from labctl_workers.record import NODE_PACKAGES_FOLDER

_node_packages = Path(__file__).parent.parent / NODE_PACKAGES_FOLDER
if _node_packages.is_dir() and str(_node_packages) not in sys.path:
    sys.path.append(str(_node_packages))  # last: the Python's own packages take precedence
