"""A checkpoint's config.json gives exactly the mask that it was trained with, or a refusal."""

from typing import Any

import pytest

from tests.support.trained_fields import BY_LAYER, PLAIN
from vllm_sepllm.policy.trained import check_architecture, trained_policy


def read(max_model_len: int = 2048, **changed: Any) -> Any:
    config = {key: value for key, value in (PLAIN | changed).items() if value != "missing"}
    return trained_policy(config, num_layers=4, max_model_len=max_model_len)


def test_one_window_for_all_layers() -> None:
    policy = read()
    assert (policy.initial_tokens, policy.window) == (3, 64)
    assert policy.separators == (15, 13, 32, 2, 28, 27, 209, 186, 187)
    assert policy.full_layers == ()
    assert policy.max_separators == 2048, "training bounded nothing"


def test_first_and_last_layer_full() -> None:
    policy = read(**BY_LAYER)
    assert (policy.window, policy.full_layers) == (64, (0, 3))


@pytest.mark.parametrize("changed", [{"streamingLLM": True}, {"separator_token_ids": [-1]}])
def test_no_separators(changed: dict[str, Any]) -> None:
    assert read(**changed).separators == ()


def test_a_window_beyond_every_request_is_not_mistaken_for_a_full_layer() -> None:
    policy = read(max_model_len=48, generate_local_window_size=64)
    assert (policy.window, policy.full_layers) == (64, ())


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"USE_BiPE": True}, "bilevel position encoding", "USE_BiPE false"),
    ({"USE_SA_SOFTMAX": True}, "self-adjusting softmax", "USE_SA_SOFTMAX false"),
    ({"USE_SA_SOFTMAX_NO_DENO": True}, "self-adjusting softmax", "USE_SA_SOFTMAX_NO_DENO false"),
    ({"USE_ORIGINAL_FULL_ATTEN": True}, "trained with full attention", "without --attention"),
    ({"EXCLUDE_DIAGONAL": False}, "EXCLUDE_DIAGONAL false", "EXCLUDE_DIAGONAL true"),
    ({"generate_local_window_size": 32}, "same window in prefill and decode", "set its generate"),
    (
        BY_LAYER
        | {
            "prefill_loc_win_size_list": [2048, 64, 64, 256],
            "generate_win_loc_size_list": [2048, 64, 64, 256],
        },
        "windows of 64 and of [256] tokens",
        "--max-model-len to 256 or less",
    ),
    (BY_LAYER | {"prefill_loc_win_size_list": [64]}, "each of 4 layers, got 1", "correct the"),
    ({"separator_token_ids": "missing"}, "needs separator_token_ids", "add the value"),
    ({"separator_token_ids": []}, "separator_token_ids in its config.json, a list", "add the"),
    ({"separator_token_ids": [1, "."]}, "a list of integers, got [1, '.']", "add the value"),
    ({"init_tok_max_idx": "missing"}, "needs init_tok_max_idx", "add the value"),
    ({"init_tok_max_idx": True}, "an integer, got True", "add the value"),
    ({"prefill_local_window_size": "missing"}, "needs prefill_local_window_size", "add the value"),
]


@pytest.mark.parametrize(("changed", "what", "remedy"), WRONG, ids=[row[1] for row in WRONG])
def test_other_models_are_refused(changed: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(ValueError, match="checkpoint") as caught:
        read(**changed)
    text = str(caught.value)
    assert what in text
    assert remedy in text
    assert "\n" not in text


def test_architecture_is_checked_without_a_policy() -> None:
    check_architecture({})
    with pytest.raises(ValueError, match="BiPE"):
        check_architecture({"USE_BiPE": True, "USE_ORIGINAL_FULL_ATTEN": True})
