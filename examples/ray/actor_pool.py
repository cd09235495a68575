"""Continuations of long files from a pool of engines on a Ray cluster, one whole engine an actor.

Run: ``python examples/ray/actor_pool.py NUM_ENGINES MODEL FILE... [--dtype DTYPE]``, with
RAY_ADDRESS naming the cluster; without it Ray starts one on this machine.
"""

import argparse
from pathlib import Path

import ray
from ray.util import ActorPool


# an engine whose process dies is started again, and the files that it worked on are asked again
@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)
class Engine:
    """vLLM with SepLLM's KV cache. On GPUs: ``num_gpus=1`` above."""

    def __init__(self, model: str, dtype: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            dtype=dtype,
            attention_backend="sepllm",
            # several engines may share a machine, so each says what its KV cache may take
            kv_cache_memory_bytes=256 << 20,
        )

    def continuation(self, text: str) -> str:
        """What the model writes after ``text``."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=32)
        return self.llm.generate([text], greedy)[0].outputs[0].text


def main(num_engines: int, model: str, files: list[str], dtype: str) -> None:
    """Print a continuation of every file."""
    ray.init()
    pool = ActorPool([Engine.remote(model, dtype) for _ in range(num_engines)])
    texts = [Path(file).read_text("utf-8") for file in files]
    answers = pool.map(lambda engine, text: engine.continuation.remote(text), texts)
    for file, answer in zip(files, answers, strict=True):
        print(f"{file}: {answer.strip()}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Continuations from a pool of engines.")
    parser.add_argument("num_engines", type=int)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    main(args.num_engines, args.model, args.files, args.dtype)
