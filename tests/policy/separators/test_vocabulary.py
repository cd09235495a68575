"""Surfaces of tokens, for each way in which tokenizers write their pieces."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from vllm_sepllm.policy.separators.vocabulary import read_vocabulary

G = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # a blank in GPT-2's byte alphabet
C = "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"  # a newline in it
M = "\N{LOWER ONE EIGHTH BLOCK}"  # a blank in SentencePiece
STOP = "\N{IDEOGRAPHIC FULL STOP}"
SENTENCES = [
    "The cat sat; the cat ran. Did the cat run? It did!",
    f"def f(x):\n    return (x, 1)\n\n\u732b\u5750\u4e0b{STOP}\u732b\u8dd1{STOP}",
] * 8


@dataclass
class FakeTokenizer:
    """A tokenizer that is its vocabulary."""

    pieces: Mapping[Any, int]
    added: Mapping[str, int] = field(default_factory=dict)
    all_special_ids: list[int] = field(default_factory=list)

    def get_vocab(self) -> Mapping[Any, int]:
        return {**self.pieces, **self.added}

    def get_added_vocab(self) -> Mapping[str, int]:
        return self.added


def numbered(*pieces: str) -> dict[str, int]:
    return {piece: token_id for token_id, piece in enumerate(pieces)}


def text_of(*pieces: str) -> dict[int, str]:
    return read_vocabulary(FakeTokenizer(numbered(*pieces))).text


def test_byte_level_pieces_are_their_bytes() -> None:
    pieces = [f"{G}the", f".{C}{C}", "\u00e3\u0122\u0124", "\u00e3\u0122", "\u00c3\u00a9", "\u732b"]
    # the last is outside the alphabet
    assert text_of(*pieces) == {0: " the", 1: ".\n\n", 2: STOP, 4: "\u00e9", 5: "\u732b"}


def test_sentencepiece_pieces_and_byte_pieces() -> None:
    pieces = [f"{M}the", f"{M}{M}", "<0x0A>", "<0xE3>", f"{G}urdan", ".", "<0x2E>"]
    assert text_of(*pieces) == {0: " the", 1: "  ", 2: "\n", 4: f"{G}urdan", 5: ".", 6: "."}


def test_decoded_pieces_stay_as_they_are() -> None:
    """As vLLM's tokenizer for Mistral's tekken reports them."""
    pieces = [" the", " .", M, f"{G}urdan", "\ufffd", "<0x0A>", ".\n"]
    assert text_of(*pieces) == {
        0: " the",
        1: " .",
        2: M,
        3: f"{G}urdan",
        5: "<0x0A>",
        6: ".\n",
    }


def test_pieces_of_bytes() -> None:
    vocabulary = read_vocabulary(FakeTokenizer({b" the": 0, b"\xe3\x80\x82": 1, b"\xe3": 2}))
    assert vocabulary.text == {0: " the", 1: STOP}
    assert vocabulary.size == 3


def test_control_tokens_are_the_named_ones_and_tags() -> None:
    tokenizer = FakeTokenizer(
        numbered(f"{G}the", "a"),
        added={"<|start_header_id|>": 2, "[INST]": 3, "  ": 4, "\u00e9": 5, "END": 6},
        all_special_ids=[6],
    )
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.control == {2: "<|start_header_id|>", 3: "[INST]", 6: "END"}
    # added text of a byte-level vocabulary is not in the byte alphabet
    assert vocabulary.text == {0: " the", 1: "a", 4: "  ", 5: "\u00e9"}


def test_special_ids_without_an_added_vocabulary() -> None:
    """vLLM's tokenizer for Mistral models reports none."""
    tokenizer = FakeTokenizer(numbered("[INST]", " the", "[x]"), all_special_ids=[0])
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.control == {0: "[INST]"}
    assert vocabulary.text == {1: " the", 2: "[x]"}


def test_sentencepiece_added_blanks_are_blanks_but_tags_are_literal() -> None:
    """Gemma adds runs of U+2581, DeepSeek writes it inside a control token."""
    added = {f"{M}{M}": 1, "\n\n": 2, f"<begin{M}of{M}sentence>": 3}
    vocabulary = read_vocabulary(FakeTokenizer(numbered(f"{M}the"), added))
    assert vocabulary.text == {0: " the", 1: "  ", 2: "\n\n"}
    assert vocabulary.control == {3: f"<begin{M}of{M}sentence>"}


def test_size_counts_tokens_without_a_surface() -> None:
    vocabulary = read_vocabulary(FakeTokenizer({f"{G}a": 0, "\u00e3": 9}))
    assert vocabulary.text == {0: " a"}
    assert vocabulary.size == 10


def trained(kind: str) -> Any:
    """A BPE of the `tokenizers` library, trained on SENTENCES."""
    tokenizers = pytest.importorskip("tokenizers")
    decoders, pre_tokenizers = tokenizers.decoders, tokenizers.pre_tokenizers
    trainer_args: dict[str, Any] = {"special_tokens": ["<|im_end|>"], "show_progress": False}
    if kind == "byte-level":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer_args["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        trainer_args["special_tokens"] += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, **trainer_args)
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_surfaces_equal_what_the_tokenizer_decodes(kind: str) -> None:
    backend = trained(kind)
    tokenizer = FakeTokenizer(backend.get_vocab(), all_special_ids=[0])
    vocabulary = read_vocabulary(tokenizer)
    anchor = backend.token_to_id("a")
    num_compared = 0
    for token_id in range(1, backend.get_vocab_size()):
        # behind another token, since a decoder may drop a text's first blank
        decoded = backend.decode([anchor, token_id], skip_special_tokens=False)
        if "\ufffd" in decoded:
            assert token_id not in vocabulary.text
        else:
            assert vocabulary.text[token_id] == decoded.removeprefix("a")
            num_compared += 1
    assert num_compared > 150
    assert vocabulary.control == {0: "<|im_end|>"}
    assert STOP in vocabulary.text.values()
    assert " cat" in vocabulary.text.values()
