"""``python -m vllm_sepllm``: the command ``vllm-sepllm``."""

from vllm_sepllm.cli.app import main

if __name__ == "__main__":
    main()
