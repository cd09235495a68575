"""The plugin's logger, in every process."""

import logging

# vLLM logs through the handlers of the logger "vllm", so that users see a child of it alone. Its
# init_logger would add methods that we do not use, and import vLLM where the version is unknown.
logger = logging.getLogger("vllm.plugins.sepllm")
