"""Prompts whose prefixes are shared as users share them: at random, in rounds."""

import random

from tests.support.tiny_models import tiny_text


def workload(seed: int, num_rounds: int = 5) -> list[list[list[int]]]:
    """Rounds of prompts: shared prefixes cut anywhere, continuations, resends."""
    pick = random.Random(seed)
    rounds: list[list[list[int]]] = []
    known: list[list[int]] = [tiny_text(0, 700)]
    for _ in range(num_rounds):
        prompts = []
        for _ in range(4):
            base = pick.choice(known)
            cut = pick.choice([31, 32, 33, 63, 64, 65, 96, 100, 300, 520, len(base)])
            suffix = tiny_text(pick.randrange(1000, 20000), pick.choice([1, 5, 40, 200]))
            prompts.append([*base[:cut], *suffix])
        prompts.append(list(pick.choice(known)))
        known += prompts
        rounds.append(prompts)
    return rounds
