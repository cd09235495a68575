"""What the name ``SEPLLM`` resolves to if vLLM looks the backend class up by itself."""

from typing import NoReturn

from vllm.v1.attention.backend import AttentionBackend


class SepLLMBackend(AttentionBackend):
    """Never attends: our worker replaces the platform's own backend layer by layer instead.

    vLLM gets here only if a VllmConfig was put together without EngineArgs, so nobody chose our
    scheduler and worker.
    """

    @staticmethod
    def get_name() -> str:
        """The name in ``AttentionBackendEnum``."""
        return "SEPLLM"

    @staticmethod
    def get_impl_cls() -> NoReturn:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "the attention backend sepllm needs its own scheduler and worker, which are chosen by "
            "EngineArgs.create_engine_config(); create the VllmConfig with it, or use vllm.LLM or "
            "vllm serve"
        )

    @staticmethod
    def get_builder_cls() -> NoReturn:
        """Refuse, as :meth:`get_impl_cls`."""
        return SepLLMBackend.get_impl_cls()
