"""Python processes that tests start are told what the tests are not about."""

import subprocess
import sys


def test_children_of_a_test_look_for_garbage_rarely_and_have_no_extra() -> None:
    code = "import gc, importlib.util as i; print(gc.get_threshold()[0], i.find_spec('sklearn'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["100000", "None"]
