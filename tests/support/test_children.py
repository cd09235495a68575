"""Python processes that tests start are told what the tests are not about."""

import subprocess
import sys

CODE = """
import gc
from importlib.util import find_spec

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        print("collected")

Cycle()
gc.collect()
print(gc.get_threshold()[0], find_spec("scipy"), find_spec("sklearn"))
"""


def test_children_of_a_test_look_for_garbage_rarely_and_have_no_extra() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["100000", "None", "None"]
