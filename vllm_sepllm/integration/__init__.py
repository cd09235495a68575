"""The only package that imports vllm. Nothing outside it may import it eagerly."""


def register() -> None:
    """Announce our name to vLLM and watch for its selection; changes nothing until then.

    vLLM calls this in every process that it starts, possibly more than once.
    """
    from vllm_sepllm.integration import engine_args, selected
    from vllm_sepllm.integration.backend_name import register_backend_name

    register_backend_name()
    engine_args.install()
    selected.install()
