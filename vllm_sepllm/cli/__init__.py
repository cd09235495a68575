"""The command ``vllm-sepllm``: one file a subcommand, heavy imports inside functions."""
