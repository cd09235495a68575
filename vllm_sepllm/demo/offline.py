"""One side of the comparison: ``LLM.generate`` over all documents, measured.

Run by the demonstration, once for each backend, in a process of its own:
``python -m vllm_sepllm.demo.offline --model PATH --backend stock|sepllm --out FILE``
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_sepllm.demo.corpus import QUESTIONS, chat
from vllm_sepllm.demo.probe import Probe
from vllm_sepllm.sample import documents

BLOCK_SIZE = 32
MAX_ANSWER_TOKENS = 40
AS_TEXT: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}


@dataclass(frozen=True, slots=True)
class Result:
    """What one backend did with the documents.

    Attributes:
        answers: document title -> answer.
        distances: document title -> tokens between what answers the question and the answer.
        num_prompt_tokens, num_answer_tokens: totals over all requests.
        seconds: wall time of ``LLM.generate``, without start-up.
        num_running: most requests that held KV cache at the same time.
        num_blocks: blocks in the pool.
        blocks_per_request: most blocks that a request held, the largest of all requests.
        block_bytes: bytes of one block over all layers.
    """

    answers: dict[str, str]
    distances: dict[str, int]
    num_prompt_tokens: int
    num_answer_tokens: int
    seconds: float
    num_running: int
    num_blocks: int
    blocks_per_request: int
    block_bytes: int

    @property
    def num_right(self) -> int:
        """Answers with the words that the document answers the question with."""
        return sum(QUESTIONS[title].is_answered_by(text) for title, text in self.answers.items())

    @property
    def mib_per_request(self) -> float:
        """KV cache of the request that held most."""
        return self.blocks_per_request * self.block_bytes / 2**20

    @property
    def capacity(self) -> int:
        """Requests like the largest that fit at once; vLLM keeps one block for itself."""
        return (self.num_blocks - 1) // self.blocks_per_request


@dataclass(frozen=True, slots=True)
class Scale:
    """How much a processor can do in a few minutes.

    Attributes:
        titles: of the documents.
        num_characters: of each document that is read; None: all.
        engine: arguments of an engine. With full attention and the 0.5B model its KV cache has
            room for a third of the texts.
    """

    titles: tuple[str, ...]
    num_characters: int | None
    engine: dict[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        """Title -> what is read."""
        whole = documents()
        return {
            title: QUESTIONS[title].part_of(whole[title], self.num_characters)
            for title in self.titles
        }


_WHOLE = Scale(
    titles=tuple(QUESTIONS),
    num_characters=None,
    engine={"dtype": "bfloat16", "kv_cache_memory_bytes": 165 << 20, "max_model_len": 8192},
)
_PARTS = Scale(
    titles=("glow-worm", "revere", "versailles"),
    num_characters=8400,
    engine={"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_model_len": 2560},
)


def scale() -> Scale:
    """All documents in bfloat16, or a third of three in float32.

    x86 CPUs without instructions for bfloat16 emulate it, at a third of float32's speed or less.
    With a GPU the CPU does not matter; to ask for one would start CUDA before vLLM forks, so
    torch's build is asked.
    """
    from torch import cpu
    from torch.backends import cuda

    is_for_gpus = cuda.is_built()  # type: ignore[no-untyped-call]  # torch has no types for it
    is_emulated = not is_for_gpus and not cpu._is_avx512_bf16_supported()
    return _PARTS if is_emulated else _WHOLE


def engine_arguments(model: Path, backend: str) -> dict[str, Any]:
    """Keyword arguments of ``LLM``; the two backends differ in the backend alone."""
    arguments: dict[str, Any] = {
        "model": str(model),
        **scale().engine,
        "enforce_eager": True,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
    }
    return arguments | ({"attention_backend": "sepllm"} if backend == "sepllm" else {})


def run(model: Path, backend: str) -> Result:
    """Start an engine, ask one question about every document, all at once, and measure."""
    from vllm import LLM, SamplingParams

    print(f"  starting vLLM ({backend}), half a minute", flush=True)
    llm = LLM(**engine_arguments(model, backend))
    texts = scale().texts
    tokenizer = llm.get_tokenizer()
    template = tokenizer.apply_chat_template
    prompts = {
        title: str(template([*chat(text, QUESTIONS[title].text)], **AS_TEXT))
        for title, text in texts.items()
    }
    distances = {
        title: len(tokenizer.encode(prompt.partition(QUESTIONS[title].told)[2]))
        for title, prompt in prompts.items()
    }
    llm.generate("Warm up.", SamplingParams(max_tokens=2), use_tqdm=False)
    probe = Probe(llm)
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    start = time.perf_counter()
    outputs = llm.generate(list(prompts.values()), sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Result(
        answers={t: o.outputs[0].text.strip() for t, o in zip(texts, outputs, strict=True)},
        distances=distances,
        num_prompt_tokens=sum(len(o.prompt_token_ids or ()) for o in outputs),
        num_answer_tokens=sum(len(o.outputs[0].token_ids) for o in outputs),
        seconds=seconds,
        num_running=probe.usage.num_running,
        num_blocks=probe.usage.num_blocks,
        blocks_per_request=max(probe.usage.blocks.values()),
        block_bytes=probe.usage.block_bytes,
    )


def main() -> None:
    """Write the measurements as JSON to ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--backend", choices=("stock", "sepllm"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(asdict(run(args.model, args.backend))))


if __name__ == "__main__":
    main()
