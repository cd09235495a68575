"""SepLLM attention for vLLM. Importing this loads neither torch, triton nor vllm."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make ``sepllm`` selectable."""
    from vllm_sepllm.integration import register as _register

    _register()


def register_backend_name() -> None:
    """Entry point of the group ``vllm.platform_plugins``: register the backend's name alone.

    vLLM parses ``LLM(attention_config={"backend": "sepllm"})`` before it loads general plugins,
    but resolves the platform earlier still. This offers no platform: it returns None.
    """
    from vllm_sepllm.integration.startup import unsupported
    from vllm_sepllm.integration.startup.versions import unsupported_vllm
    from vllm_sepllm.integration.wire.backend_name import register_backend_name as _register

    if reason := unsupported_vllm():
        unsupported.install(reason)
    else:
        _register()
