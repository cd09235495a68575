"""The plugin's logger, in every process."""

import logging

# Child of the logger "vllm", whose handlers show it to users. Not made by vLLM's init_logger:
# start-up also logs beside a vLLM that is not supported.
logger = logging.getLogger("vllm.plugins.sepllm")
