"""The simulator of SepCache does what its description says, and it is not our rule."""

import numpy as np
import pytest

from examples.paper.sepcache import SepCache, sepcache_mask
from vllm_sepllm.policy.visibility import Policy, visible_mask

IS_SEPARATOR = np.array([0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0], dtype=bool)


def reads(sizes: SepCache, num_prompt_tokens: int) -> list[list[int]]:
    mask = sepcache_mask(sizes, IS_SEPARATOR, num_prompt_tokens)
    return [np.flatnonzero(row).tolist() for row in mask]


def test_a_small_text_by_hand() -> None:
    """a = 1, s = 2, w = 3, c = 9; the prompt has 8 tokens."""
    found = reads(SepCache(1, 2, 3, 9), 8)
    # the prompt: full attention
    assert found[7] == list(range(8))
    # the first step compacts: 0, the last two of the separators 1 and 3, and 6 to 8
    assert found[8] == [0, 1, 3, 6, 7, 8]
    # nothing is forgotten until nine are held
    assert found[10] == [0, 1, 3, 6, 7, 8, 9, 10]
    # 1 is older than the last two, 7 and 8 are no separators
    assert found[11] == [0, 3, 6, 9, 10, 11]


def test_results_depend_on_where_the_prompt_ends() -> None:
    sizes = SepCache(1, 2, 3, 9)
    assert reads(sizes, 8)[13] != reads(sizes, 12)[13]
    # ours does not know where it ends
    ours = visible_mask(Policy(1, 3, 2), IS_SEPARATOR)
    assert np.flatnonzero(ours[13]).tolist() == [0, 6, 10, 11, 12, 13]


def test_a_prompt_that_never_decodes_is_full_attention() -> None:
    mask = sepcache_mask(SepCache(1, 2, 3, 9), IS_SEPARATOR, 16)
    assert (mask == np.tril(np.ones((16, 16), dtype=bool))).all()


@pytest.mark.parametrize("start", [0, 1, 5])
def test_compacted_at_every_step_it_is_our_rule(start: int) -> None:
    """With c = a + s + w + 1, once two separators have left the window."""
    ours = visible_mask(Policy(1, 3, 2), IS_SEPARATOR)
    mask = sepcache_mask(SepCache(1, 2, 3, 7), IS_SEPARATOR, start)
    assert mask[6:].tolist() == ours[6:].tolist()


def test_the_side_by_side_of_a_small_random_model() -> None:
    """Masks reach the model: full attention differs from ours, and equals itself."""
    pytest.importorskip("transformers")
    from examples.paper import side_by_side
    from tests.support.tiny_models import eager_llama

    model = eager_llama(2)
    ids = np.random.default_rng(0).integers(0, 50, 300).tolist()
    found = side_by_side.masks(np.array(ids) < 5, [200])
    full, ours, theirs = side_by_side.compare(model, ids, found, 250)
    assert (full.divergence, full.kept) == (0.0, 275.0)
    assert ours.divergence > 0.01
    assert ours.kept < theirs.kept < full.kept
    assert side_by_side.markdown([full]).splitlines()[-1].startswith("| full attention | 275 |")


def test_a_capacity_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"more than initial_tokens .* = 6, got 6"):
        SepCache(1, 2, 3, 6)
