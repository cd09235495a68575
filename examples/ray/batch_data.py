"""A batch job over a file of prompts with Ray Data: engines side by side, each with SepLLM's cache.

Run: ``python examples/ray/batch_data.py NUM_ENGINES MODEL PROMPTS OUT [--dtype DTYPE]``, where
PROMPTS has a JSON object with a field "text" on each line and OUT is the folder for the answers.
"""

import argparse
from typing import Any

import ray


class Engine:
    """One of the workers of the job: a whole vLLM. On GPUs: ``num_gpus=1`` below."""

    def __init__(self, model: str, dtype: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            dtype=dtype,
            attention_backend="sepllm",
            # several engines may share a machine, so each says what its KV cache may take
            kv_cache_memory_bytes=256 << 20,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=32)
        outputs = self.llm.generate(batch["text"].tolist(), greedy)
        return batch | {"answer": [output.outputs[0].text for output in outputs]}


def main(num_engines: int, model: str, prompts: str, out: str, dtype: str) -> None:
    """Write the lines of ``prompts`` to ``out``, each with a field "answer"."""
    ray.init()
    answered = ray.data.read_json(prompts, lines=True).map_batches(
        Engine,
        fn_constructor_args=(model, dtype),
        compute=ray.data.ActorPoolStrategy(size=num_engines),
        batch_size=16,
        num_cpus=1,
    )
    answered.write_json(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Answers to a file of prompts.")
    parser.add_argument("num_engines", type=int)
    for name in ("model", "prompts", "out"):
        parser.add_argument(name)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    main(args.num_engines, args.model, args.prompts, args.out, args.dtype)
