"""Our visible sets are M1's formula for the authors' separator lists, on the bundled documents.

The tokenizers of Llama-3, GPT-NeoX and Falcon are not here, so the text is cut by a regular
expression into words, marks and blanks; marks and blanks get the ids of the published lists, words
get others. The authors publish no list for Qwen.
"""

import re

import numpy as np
import pytest

from tests.support.rule import visible
from tests.support.simulated_cache import Cache
from vllm_sepllm.policy.kept import kept_lengths
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.policy.visibility import Policy, visible_mask
from vllm_sepllm.sample import FOLDER

# list -> (vocabulary size, surface -> id); blank-prefixed forms as in the authors' cache
PUBLISHED = {
    "llama-3": (
        128256,
        {
            **{".": 13, ",": 11, "?": 30, "!": 0, ";": 26, ":": 25, "\n": 198, " ": 220},
            **{" .": 662, " ,": 1174, " ?": 949, " !": 758, " ;": 2652, " :": 551, " \n": 720},
            **{"  ": 256, "   ": 262},
        },
    ),
    "gpt-neox": (
        50304,
        {
            **{".": 15, ",": 13, "?": 32, "!": 2, ";": 28, ":": 27, " ": 209, "\t": 186},
            **{"\n": 187, " .": 964, " ,": 1157, " ?": 3736, " !": 2195, " ;": 3706, " :": 1163},
            **{" \n": 2490, "  ": 50276, "\n ": 586, " \n ": 4928, "   ": 50275},
        },
    ),
    # the surfaces behind this list are not stated; a mark each will do here
    "falcon": (
        65024,
        dict(
            zip(
                [".", ",", "?", "!", ";", ":", "\n", " ", " .", " ,", " ?", " !", " ;"],
                [25, 23, 42, 12, 38, 37, 193, 4610, 204, 258, 1212, 23787, 466],
                strict=True,
            )
        ),
    ),
}
POLICIES = [Policy(3, 256), Policy(4, 60), Policy(3, 64, 40), Policy(0, 16, 0)]


def tokenise(name: str) -> tuple[list[int], dict[str, int], int]:
    """About 1,500 tokens; words get ids between those of the list."""
    size, ids = PUBLISHED[name]
    marks = sorted(map(re.escape, ids), key=len, reverse=True)
    text = (FOLDER / "revere.txt").read_text()[2000:9000]
    pieces = re.findall("|".join([r" ?\w+", *marks, "."]), text, re.DOTALL)
    free = sorted(set(range(1000, 60000)) - set(ids.values()))
    words = {p: free[7 * i % len(free)] for i, p in enumerate(dict.fromkeys(pieces))}
    return [ids.get(piece, words[piece]) for piece in pieces], ids, size


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_visible_sets_are_the_formula(name: str, policy: Policy) -> None:
    token_ids, ids, size = tokenise(name)
    separators = token_separators(list(ids.values()), None, size)
    is_separator = [token_id in set(ids.values()) for token_id in token_ids]
    assert 0.05 < np.mean(is_separator) < 0.5
    index = SeparatorIndex(policy, separators)
    index.extend(token_ids, len(token_ids))
    a = policy.initial_tokens
    assert index.positions(0, 10**6).tolist() == [i for i in np.flatnonzero(is_separator) if i >= a]
    mask = visible_mask(policy, np.array(is_separator))
    kept = kept_lengths(policy, np.array(is_separator))
    for query in range(0, len(token_ids), 37):
        wanted = visible(policy, is_separator, query)
        assert np.flatnonzero(mask[query]).tolist() == wanted
        assert kept[query] == len(wanted)
    # and what the ring and the tail hold, step by step, in chunks and then one by one
    cache = Cache(policy, [int(flag) for flag in is_separator])
    for size_of_step in [512, 300, *[1] * 60, 200]:
        cache.step(size_of_step, 128)
    last = cache.num_tokens - 1
    assert sorted(cache.entries.values()) == visible(policy, is_separator, last)
