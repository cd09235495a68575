"""SepLLM's fields in the config.json of a checkpoint that the authors' code trained."""

from typing import Any

# the fields that the authors' converter writes
PLAIN: dict[str, Any] = {
    "separator_token_ids": [15, 13, 32, 2, 28, 27, 209, 186, 187],
    "PADDING_ID": 0,
    "prefill_k": 0,
    "generate_k": 0,
    "prefill_local_window_size": 64,
    "generate_local_window_size": 64,
    "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": False,
    "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": False,
    "prefill_loc_win_size_list": [2048, 64, 64, 2048],
    "generate_win_loc_size_list": [2048, 64, 64, 2048],
    "init_tok_max_idx": 2,
    "USE_ORIGINAL_FULL_ATTEN": False,
    "streamingLLM": False,
    "PRINT_KV_RATIO": False,
    "print_ratio_intervals": 8000,
    "EXCLUDE_DIAGONAL": True,
    "USE_BiPE": False,
    "BiPE_seps": [15, 13, 32, 2, 28, 27, 209, 186, 187],
    "USE_SA_SOFTMAX": False,
    "USE_SA_SOFTMAX_NO_DENO": False,
    "SA_Numerator_Bias": 0.0,
    "SA_Denominator_Bias": 1e-10,
    "BATCH_ADAPTIVE_INIT_POS": False,
}
BY_LAYER = {
    "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True,
    "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS": True,
}
