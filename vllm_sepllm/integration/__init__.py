"""The only package that imports vllm. Nothing outside it may import it eagerly."""


def register() -> None:
    """Entry point of the plug-in: name sepllm and its model to vLLM, watch for the selection.

    vLLM calls this in every process that it starts, possibly more than once. An unsupported vLLM is
    not touched: it refuses the unknown backend, and the log says why.
    """
    from vllm_sepllm.integration.log import logger
    from vllm_sepllm.integration.startup.versions import unsupported_vllm

    if reason := unsupported_vllm():
        logger.warning("sepllm is not available: %s", reason)
        return
    from vllm_sepllm.integration.startup import selection, unselected_backend
    from vllm_sepllm.integration.wire import trained_config
    from vllm_sepllm.integration.wire.backend_name import register_backend_name

    register_backend_name()
    selection.install()
    unselected_backend.install()
    trained_config.register_model()
