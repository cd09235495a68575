"""Models whose files cannot be read: why, and what to do instead, in one sentence."""

from pathlib import Path

_LOG_IN = "log in with `hf auth login`"


def unreadable(model: str, *files: str, revision: str | None = None) -> str | None:
    """Why one of the files cannot be had; None if that is not what is wrong with the model.

    For a model that could not be read: transformers and vLLM repeat Hugging Face's remarks on the
    form of names where a folder was mistyped. Online it asks Hugging Face again.

    Args:
        model: what the user named.
        files: of the model, without which it cannot be read.
        revision: of a model on Hugging Face.
    """
    return _in_folder(Path(model), files) if _is_path(model) else _on_hub(model, files, revision)


def _is_path(model: str) -> bool:
    # a name on Hugging Face has one slash at most; vLLM takes addresses with a colon, too
    is_no_name = model.startswith((".", "/", "~")) or model.count("/") > 1
    return Path(model).exists() or (is_no_name and ":" not in model)


def _in_folder(path: Path, files: tuple[str, ...]) -> str | None:
    if path.is_file():
        return None  # vLLM reads some
    if not path.is_dir():
        return (
            "there is no such folder; name the one that holds the model's config.json, or a "
            "model on Hugging Face such as Qwen/Qwen3-0.6B"
        )
    missing = [name for name in files if not (path / name).exists()]
    if not missing or (path / "params.json").exists():  # Mistral's own format, which vLLM reads
        return None
    return (
        f"the folder has no {missing[0]}; name one that holds a whole model, as `hf download` and "
        "`save_pretrained` write it"
    )


def _on_hub(model: str, files: tuple[str, ...], revision: str | None) -> str | None:
    from huggingface_hub import auth_check, hf_hub_download, is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name = ""
    try:
        for name in files:
            hf_hub_download(model, name, revision=revision, local_files_only=True)
        return None
    except LocalEntryNotFoundError:
        where = f"there is no such folder, and no {name} of it in the Hugging Face cache"
    except Exception:  # no name at all, or no revision: reading the model has met it and said so
        return None
    if is_offline_mode():
        return f"{where}; check the name, or set HF_HUB_OFFLINE=0 to download it"
    try:
        auth_check(model)
    except GatedRepoError:  # a RepositoryNotFoundError, too
        return f"the model is gated on Hugging Face; accept the terms on its page and {_LOG_IN}"
    except RepositoryNotFoundError:
        return (
            "there is no such folder, and no such model on Hugging Face unless it is private; "
            f"check the name, or {_LOG_IN}"
        )
    except HfHubHTTPError:
        return None
    except Exception:  # whatever the HTTP client raises where nothing answers
        return f"{where}, nor is Hugging Face reached; check the network, or name a folder"
    return None
