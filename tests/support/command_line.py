"""The command line as a test calls it, a model and a text for it (a pytest plugin)."""

from collections.abc import Callable
from pathlib import Path

import pytest

SENTENCE = "The cat sat; the cat ran.\nDid it? [INST] <b>Yes & no</b>, {{title}}.\n"
Run = Callable[..., str]


@pytest.fixture
def run() -> Run:
    """Call a subcommand; return what it printed, both streams, after checking its exit code."""
    from typer.testing import CliRunner

    from vllm_sepllm.cli.app import app

    def call(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
        assert done.exit_code == code, done.output
        return done.output

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's config of 4 layers and a byte-level BPE trained on SENTENCE, without weights."""
    import tokenizers
    import transformers

    from tests.support.tiny_models import llama_config

    folder = tmp_path_factory.mktemp("tiny")
    config = llama_config(vocab_size=320, num_hidden_layers=4, head_dim=None, dtype="bfloat16")
    config.save_pretrained(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel
    backend.pre_tokenizer = level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SENTENCE] * 4, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Forty times SENTENCE, and a character that is several tokens."""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 40 + "\N{CAT FACE}\n", "utf-8")
    return path
