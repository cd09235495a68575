"""The plugin's logger, in every process."""

import logging

# A child of the logger "vllm", through whose handlers users see it. vLLM's init_logger would add
# the methods *_once alone, and start-up logs here also beside a vLLM that is not supported.
logger = logging.getLogger("vllm.plugins.sepllm")
