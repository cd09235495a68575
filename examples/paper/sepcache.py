"""The authors' Hugging Face cache, SepCache, as masks: to compare results with, never to serve.

It is another algorithm than ours. The prompt is read with full attention, whatever its length. The
first decode step compacts the cache to the initial tokens, the last s separators and the last w
tokens; later steps do so whenever it has grown to c entries. So what a token may read depends on
where the prompt ended and on how many steps have passed, and between two compactions up to c
entries are held, forgotten tokens among them.
"""

from dataclasses import dataclass

import numpy as np

from vllm_sepllm.policy.visibility import BoolArray


@dataclass(frozen=True, slots=True)
class SepCache:
    """Sizes of the cache's parts, in tokens.

    Attributes:
        initial_tokens: a.
        max_separators: s.
        window: w, the query's own token included.
        capacity: c, more than a + s + w: a cache that reaches it is compacted.
    """

    initial_tokens: int
    max_separators: int
    window: int
    capacity: int

    def __post_init__(self) -> None:
        least = self.initial_tokens + self.max_separators + self.window
        if self.capacity <= least:
            raise ValueError(
                f"capacity must be more than initial_tokens + max_separators + window = {least}, "
                f"got {self.capacity}"
            )

    def compact(self, held: list[int], is_separator: BoolArray) -> list[int]:
        """The positions that stay of those held, ascending."""
        near = held[-self.window :] if self.window else []
        rest = held[: len(held) - len(near)]
        initial = [j for j in rest if j < self.initial_tokens]
        far = [j for j in rest if j >= self.initial_tokens and is_separator[j]]
        return initial + far[max(0, len(far) - self.max_separators) :] + near


def sepcache_mask(sizes: SepCache, is_separator: BoolArray, num_prompt_tokens: int) -> BoolArray:
    """What each query reads: [num_tokens, num_tokens], rows are queries.

    A step adds its token, compacts if it must, then attends.
    """
    num_tokens = len(is_separator)
    mask = np.tril(np.ones((num_tokens, num_tokens), dtype=np.bool_))
    held = list(range(num_prompt_tokens))
    for query in range(num_prompt_tokens, num_tokens):
        held.append(query)
        if query == num_prompt_tokens or len(held) >= sizes.capacity:
            held = sizes.compact(held, is_separator)
        mask[query] = False
        mask[query, held] = True
    return mask
