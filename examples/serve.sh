#!/usr/bin/env bash
# Serve MODEL with SepLLM's KV cache: examples/serve.sh MODEL [any option of vllm serve]
set -euo pipefail
: "${1:?usage: examples/serve.sh MODEL [any option of vllm serve]}"
exec vllm serve "$@" --attention-backend sepllm
