"""Arithmetic of ``plan`` against numbers worked out by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.command_line import Run

pytest.importorskip("transformers")

import transformers

from vllm_sepllm.cli.kv_sizes import KVShape, read_shape


def plan(run: Run, model: Path, *options: object) -> dict[str, object]:
    base = ("plan", model, "--kv-memory", "10MiB", "--context", "1k", "--json")
    base += ("--window", "252", "--density", "0.13")
    return dict(json.loads(run(*base, "--block-size", 16, *options)))


def test_bytes_and_requests_of_a_tiny_llama(run: Run, tiny_model: Path) -> None:
    """4 layers x 2 KV heads x 16 x (K and V) x 2 bytes = 512 bytes a token."""
    answer = plan(run, tiny_model, "--density", "0.125")
    assert answer["kind"] == "arithmetic, not a measurement"
    full = {"entries": 1024, "request_bytes": 524_288, "concurrent": 20}
    assert answer["full"] == full
    # 256 + 768 / 8 = 352 entries = 22 blocks of 16
    assert answer["sepllm"] == {"entries": 352, "request_bytes": 180_224, "concurrent": 58}
    # max_separators is 256: 256 + 256 = 512
    worst = {"entries": 512, "request_bytes": 262_144, "concurrent": 40}
    assert answer["worst"] == worst


@pytest.mark.parametrize(("rule", "bound"), [("sentences", 256), ("paper", 1024)])
def test_the_rule_sets_the_bound(run: Run, tiny_model: Path, rule: str, bound: int) -> None:
    answer = plan(run, tiny_model, "--context", "4k", "--separators", rule)
    assert answer["config"]["max_separators"] == bound  # type: ignore[index]
    assert answer["worst"]["entries"] == 256 + bound  # type: ignore[index]


def test_full_layers_dtype_and_tensor_parallel(run: Run, tiny_model: Path) -> None:
    options = ("--density", "0", "--full-layers", "0,-1", "--dtype", "float32")
    answer = plan(run, tiny_model, *options, "--tensor-parallel", "2", "--block-size", "32")
    # a device holds 1 KV head: 16 x 2 x 4 x 32 = 4096 bytes a block and layer
    assert answer["full"]["request_bytes"] == 4096 * 32 * 4  # type: ignore[index]
    assert answer["sepllm"]["request_bytes"] == 4096 * (32 * 2 + 8 * 2)  # type: ignore[index]
    assert answer["config"]["full_layers"] == [0, 3]  # type: ignore[index]


def test_renumbered_positions_keep_the_memory_of_any_length(run: Run, tiny_model: Path) -> None:
    """4 + 252 + 64 entries are 20 blocks; in host memory 5 bytes a token of the longest request."""
    options = ("--max-separators", "64", "--max-position", "1k")
    for context in ("2k", "1M"):
        answer = plan(run, tiny_model, *options, "--context", context)
        assert answer["sepllm"] == {"entries": 320, "request_bytes": 163_840, "concurrent": 64}
        assert answer["config"]["max_position"] == 1024  # type: ignore[index]
        names = [row["setting"] for row in answer["effects"]]  # type: ignore[attr-defined]
        assert "window 1020" not in names, "no room"
        assert not any(name.startswith("full layers") for name in names)
    base = ("plan", tiny_model, "--kv-memory", "10MiB", "--context", "1M")
    text = " ".join(run(*base, *options).split())
    assert "constant from there on" in text
    assert "each worker reserves 5.0 MiB for each of --max-num-seqs requests" in text


def test_a_request_shorter_than_the_window_costs_the_same(run: Run, tiny_model: Path) -> None:
    answer = plan(run, tiny_model, "--context", "256")
    assert answer["sepllm"] == answer["full"]


def test_effects_change_one_setting_at_a_time(run: Run, tiny_model: Path) -> None:
    rows = {row["setting"]: row for row in plan(run, tiny_model)["effects"]}  # type: ignore[attr-defined]
    assert list(rows) == [
        *("window 252", "window 508", "window 1020", "window 2044"),
        *("protected 0 tokens", "protected 1,024 tokens", "protected 4,096 tokens"),
        *("separators 5% of tokens", "separators 13% of tokens", "separators 25% of tokens"),
        *("full layers none", "full layers 0, -1"),  # all 4 layers would leave none
    ]
    assert [name for name, row in rows.items() if row["is_plan"]] == [
        *("window 252", "protected 0 tokens", "separators 13% of tokens", "full layers none")
    ]
    # 4 + 508 + 0.13 x 512
    assert rows["window 508"]["estimate"]["entries"] == 579
    assert rows["separators 25% of tokens"]["estimate"]["entries"] == 448


def test_a_protected_prefix_is_kept_beside_window_and_separators(
    run: Run, tiny_model: Path
) -> None:
    """200 + 252 + (1024 - 452) / 11 = 504 entries; the bound of separators and 4 tokens stay."""
    answer = plan(run, tiny_model, "--protected", 200, "--density", 1 / 11)
    assert answer["sepllm"]["entries"] == 504  # type: ignore[index]
    rows = {row["setting"]: row for row in answer["effects"]}  # type: ignore[attr-defined]
    assert rows["protected 200 tokens"]["is_plan"]
    assert rows["protected 200 tokens"]["estimate"]["entries"] == 504
    # 4 + 252 + 768 / 11, and a prefix as long as the request
    assert rows["protected 0 tokens"]["estimate"]["entries"] == 326
    assert rows["protected 1,024 tokens"]["estimate"] == answer["full"]
    assert plan(run, tiny_model, "--protected", 2)["sepllm"] == plan(run, tiny_model)["sepllm"]


def test_blocks_are_those_of_the_platform(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """328 entries are 11 blocks of 32 on CPUs, where sepllm takes no smaller ones."""
    base = ("plan", tiny_model, "--kv-memory", "10MiB", "--context", "1k")
    base += ("--window", "252", "--density", 0.09375)
    block_size = pytest.importorskip("vllm_sepllm.integration.startup.block_size")
    for is_cpu, size, num_blocks in ((True, 32, 11), (False, 16, 21)):
        platform = SimpleNamespace(is_cpu=lambda is_cpu=is_cpu: is_cpu, device_name="some")
        monkeypatch.setattr(block_size, "current_platform", platform)
        answer = json.loads(run(*base, "--json"))
        assert answer["sepllm"]["request_bytes"] == 512 * size * num_blocks
        assert f"Blocks of {size} tokens (this platform, some)." in run(*base)
    assert "Blocks of 64 tokens (--block-size)." in run(*base, "--block-size", 64)
    # without vLLM
    monkeypatch.setitem(sys.modules, block_size.__name__, None)
    assert "Blocks of 16 tokens (GPUs, as no vLLM is installed here" in run(*base)


def test_the_table_says_what_it_is(run: Run, tiny_model: Path) -> None:
    text = run("plan", tiny_model, "--kv-memory", "20GiB", "--context", "8k")
    assert "arithmetic, not a measurement" in text
    assert "It assumes that 5% of the tokens beyond the window" in text
    assert "The model's config ends at 4,096 positions." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-memory", "20"), "a size in bytes with a unit such as 20GiB"),
        (("--context", "32kB"), "a number of tokens such as 4096"),
        (("--full-layers", "first"), "wanted layer indices such as 0,1,-1"),
        (("--full-layers", "9"), "the model has layers -4 to 3, got [9]"),
        (("--window", "3"), "greater than or equal to 16"),
        (("--tensor-parallel", "3"), "does not go with 2 KV heads"),
        (("--dtype", "int4"), "--dtype must be auto or one of"),
    ],
)
def test_wrong_options(run: Run, tiny_model: Path, options: tuple[str, ...], message: str) -> None:
    base = ("plan", tiny_model, "--kv-memory", "1GiB", "--context", "4k")
    text = " ".join(run(*base, *options, code=2).replace("\u2502", " ").split())
    assert message in text


def test_a_folder_without_a_config(run: Run, tmp_path: Path) -> None:
    text = run("plan", tmp_path, "--kv-memory", "1GiB", "--context", "4k", code=2)
    assert f"no plan for '{tmp_path}': " in " ".join(text.replace("\u2502", " ").split())


def shape_of(name: str, **fields: object) -> KVShape:
    return read_shape(getattr(transformers, name)(**fields))


def test_layers_with_a_window_of_their_own_stay_as_they_are() -> None:
    kinds = ["sliding_attention", "full_attention"]
    shape = shape_of("Gemma2Config", num_hidden_layers=4, layer_types=kinds * 2)
    assert shape.full == (1, 3)
    assert (shape.sliding, shape.sliding_window, shape.num_kv_heads) == (2, 4096, 4)


def test_kv_heads_of_other_families() -> None:
    assert shape_of("FalconConfig").num_kv_heads == 1
    assert shape_of("GPT2Config").num_kv_heads == 12
    assert shape_of("Qwen3Config", num_key_value_heads=8).num_kv_heads == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DeepseekV2Config", "caches latents"),
        ("WhisperConfig", "encoder-decoder"),
        ("JambaConfig", "recurrent layers"),
        ("MambaConfig", "no attention heads"),
        ("Gemma3nTextConfig", "shares KV between layers"),
    ],
)
def test_what_the_arithmetic_does_not_cover(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape_of(name)
