"""The only package that imports vllm. Nothing outside it may import it eagerly."""


def register() -> None:
    """Announce our name and our model to vLLM and watch for our selection; no more until then.

    vLLM calls this in every process that it starts, possibly more than once. With a vLLM that we
    were not written for, whoever selects sepllm learns why there is no such backend (see
    vllm_sepllm.register_backend_name); nothing else is touched.
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
