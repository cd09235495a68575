"""Start of every Python process of a test: leaves out what costs time and is not tested.

Python imports this by its name at the start of every process that has the folder on its path, see
conftest.py.
"""

import atexit
import gc
import os
import sys

# what vLLM imports lives as long as its process: looking for garbage there is a tenth of the time,
# and as much again at the end, when nothing is left to be found
gc.set_threshold(100_000, 10, 10)
atexit.register(gc.freeze)
# pytest sets it while a test runs; processes of pytest-xdist, which start before, are left alone
if "PYTEST_CURRENT_TEST" in os.environ:
    # start and end of an engine collect nine times, see support/engine.py; garbage does not pile up
    gc.collect = lambda generation=2: 0  # type: ignore[assignment]
    # brought by the extra `eval` alone, and where transformers and vLLM see them, they are imported
    sys.modules |= dict.fromkeys(("scipy", "sklearn"))  # type: ignore[arg-type]
