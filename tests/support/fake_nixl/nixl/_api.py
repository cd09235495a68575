"""NIXL's module as vLLM imports it, for workers in processes of their own.

The folder above is first on the path of the process that starts them. Workers in the test's own
process have ``process_memory.install`` instead.
"""

import os

from tests.support.process_memory import ProcessMemoryAgent as nixl_agent

__all__ = ["nixl_agent", "nixl_agent_config"]

nixl_agent_config = None
# vLLM's worker would pin itself to the last core
os.sched_setaffinity = lambda pid, cores: None
