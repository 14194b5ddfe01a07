"""The whole suite takes half an hour: `make chaos`. CI runs test_quick.py, which is marked slow."""

import os

collect_ignore_glob = [] if os.environ.get("QUARTET_CHAOS") else ["test_all_*.py"]
