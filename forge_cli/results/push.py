"""Uploads a run's weights to the hub: private unless asked otherwise, and only files of an allow-list."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable
from pathlib import Path

from forge_cli.errors import ConfigError, MachineError, ModelError
from forge_cli.redaction import holds_secret, mask
from forge_cli.results.card import CARD_FILE, build_card, name_base
from forge_cli.results.find import Run
from forge_cli.run.process import prepare_process

_ALLOWED = (
    *("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat.json"),
)
_PATH_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def collect_uploads(run: Run, *, merged: bool = False) -> tuple[dict[str, Path | bytes], list[str]]:
    """Collects what is uploaded, a file or its content by name, and names what is in the folder and is not.

    The card is built anew, and local paths in settings are replaced by the model's name.

    Args:
        run: The run.
        merged: Take the merged model instead of the adapter.

    Raises:
        ConfigError: The run has no merged model, or trained the whole one.
        ModelError: A file holds what looks like an access token.
    """
    folder, proof = run.weights(), None
    if merged and run.kind == "model":
        raise ConfigError("this run trained the whole model", where="--merged", fix="leave --merged out")
    if merged:
        from forge_cli.results.merge import MERGE_FILE, find_merged

        found = find_merged(run)
        if found is None:
            raise ConfigError(
                "the run has no merged model, or its adapter has changed since",
                where=str(run.path),
                fix=f"forge merge {run.path}",
            )
        folder, proof = found, json.loads((found / MERGE_FILE).read_text(encoding="utf-8"))
    uploads: dict[str, Path | bytes] = {CARD_FILE: build_card(run, merge=proof).encode()}
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file() or not any(fnmatch.fnmatch(path.name, one) for one in _ALLOWED):
            left_out += [path.name] if path.name != CARD_FILE else []
        else:
            uploads[path.name] = path if path.suffix == ".safetensors" else _read_clean(path, run)
    return uploads, left_out


def push_run(
    run: Run,
    repo: str,
    *,
    public: bool = False,
    merged: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, object]:
    """Uploads a run's weights in one commit.

    Args:
        run: The run.
        repo: ``USER/NAME``; it is made if it is not there.
        public: Everybody may see it.
        merged: Upload the merged model instead of the adapter.
        dry_run: Only list the files; nothing is asked of the hub.
        say: Receives what is being done.

    Raises:
        ConfigError: The name is none of a repository, or the repository is public and ``public`` was not said.
        MachineError: Not logged in, or the hub refuses.
    """
    if _REPO.fullmatch(repo) is None:
        raise ConfigError("this is no name of a repository", where=f"--repo {repo}", fix="write --repo USER/NAME")
    uploads, left_out = collect_uploads(run, merged=merged)
    result: dict[str, object] = {
        "repo": repo,
        "private": not public,
        "files": {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in uploads.items()},
        "left_out": left_out,
        "url": None,
    }
    return result if dry_run else {**result, "url": _upload(repo, public, uploads, run, say)}


def _upload(repo: str, public: bool, uploads: dict[str, Path | bytes], run: Run, say: Callable[[str], None]) -> str:
    prepare_process()
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars

    if get_token() is None:
        raise MachineError(
            "you are not logged in to the hub", where=f"--repo {repo}", fix="hf auth login, or set HF_TOKEN"
        )
    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ConfigError(
                "this repository is public, and everybody would see the upload",
                where=f"--repo {repo}",
                fix="add --public if that is meant, or choose another name",
            )
        say(f"uploading {len(uploads)} files to {repo} ...")
        operations = [CommitOperationAdd(name, one) for name, one in uploads.items()]
        done = api.create_commit(repo, operations, commit_message=f"Weights of run {run.path.name}, by Forge")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = mask(" ".join(str(error).split()))[:300]
        raise MachineError("the hub did not take it", where=f"--repo {repo}", why=reason) from error
    return str(done.commit_url)


def _read_clean(path: Path, run: Run) -> bytes:
    """Reads a text file; local paths in its settings become the model's name.

    Raises:
        ModelError: It holds what looks like an access token.
    """
    content = path.read_bytes()
    text = content.decode("utf-8", errors="replace")
    if holds_secret(text):
        raise ModelError(
            "this file holds what looks like an access token or a password",
            where=str(path),
            why="it would be uploaded",
            fix="remove it from the file",
        )
    if not path.name.endswith("config.json"):
        return content
    settings = json.loads(text)
    local = [key for key in _PATH_KEYS if isinstance(settings.get(key), str) and _is_local(settings[key])]
    if not local:
        return content
    base, _ = name_base(run.plan.spec.model.name)
    return (json.dumps({**settings, **dict.fromkeys(local, base)}, indent=2, ensure_ascii=False) + "\n").encode()


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith(("~", ".")) or Path(name).exists()
