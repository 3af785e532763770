"""Secrets and control characters reach neither terminal nor logs, and names that look like them do."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from forge_cli.cli.app import run_app
from forge_cli.errors import ModelError
from forge_cli.redaction import holds_secret, mask, printable
from forge_cli.resolve.plan import resolve_plan

SECRETS = [
    "hf_" + "abcdEFGH" * 4,
    "sk-" + "aB3dE5gH" * 6,
    "sk-proj-Ab_1-" + "x9Yz" * 10,
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_" + "a1B2c3D4" * 5,
    "github_pat_" + "a1B2c3D4" * 4,
    "xoxb-1234567890-abcdef",
]
NAMES = ["cls_token", "pad_token", "num_memory_tokens", "hf_transfer", "sk-learn", "hf_my_dataset", "task-12345678901"]
NAMES += ["https://host/a:b", "shelf_abcdefghijklmnopqrst", "me@host", "AKIA", "forge:quickstart/train"]
RUN_FILE = "model: {name: forge-tiny}\ndata: {train: forge:quickstart/train, max_length: 128}\n"


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_inside_any_text(secret):
    for text in (secret, f"Authorization: Bearer {secret}", f'{{"token":"{secret}"}}', f"runs/{secret}/x"):
        assert holds_secret(text) and secret not in mask(text), text
    assert mask("https://me:pa55word@host/x") == "https://***@host/x"


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_secrets(name):
    assert not holds_secret(name) and mask(name) == name


def test_what_the_environment_calls_a_secret_is_one(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "my_secret", "DB_PASSWORD"):
        monkeypatch.setenv(name, "correct-horse")
        assert mask("say correct-horse!") == "say ***!" and holds_secret("a correct-horse"), name
        monkeypatch.delenv(name)
    monkeypatch.setenv("SOME_KEY", "short")
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id")
    monkeypatch.setenv("TOKENIZERS", "parallelism")
    assert mask("short /home/me/.ssh/id parallelism") == "short /home/me/.ssh/id parallelism"


def test_control_characters_are_escaped():
    assert printable("\x1b[31mred\x07\r\n\u202etxt") == "\\x1b[31mred\\x07\\r\\n\\u202etxt"
    assert printable("naïve 猫") == "naïve 猫"


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("error", [ModelError, OSError])
def test_no_failure_prints_a_secret(monkeypatch, capsys, error, debug):
    """The message of a library may carry request headers."""
    from forge_cli.cli import app

    def fail(**_: object) -> None:
        raise error(f"Bearer {SECRETS[0]} \x1b[31m")

    monkeypatch.setattr(app, "app", fail)
    with pytest.raises(SystemExit):
        run_app(["--debug"] if debug else [])
    said = capsys.readouterr().err
    assert "Bearer ***" in said and SECRETS[0] not in said and "\x1b" not in said
    assert ("Traceback" in said) is debug


def test_logs_and_tracebacks_hold_no_secret(tmp_path, monkeypatch):
    from forge_cli.run.process import library_logs, translated_errors

    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    log = tmp_path / "logs" / "forge.log"
    log.parent.mkdir()
    with pytest.raises(ModelError), translated_errors(log), library_logs(log):
        logging.getLogger("somebody").warning("header %s\nand \x1b[1m%s", SECRETS[0], "correct-horse-battery")
        try:
            raise OSError(f"Bearer {SECRETS[1]}")
        except OSError as error:
            logging.getLogger("somebody").exception("failed")
            raise ModelError("not loaded") from error
    text = log.read_text(encoding="utf-8")
    assert "header ***" in text and text.count("Bearer ***") >= 2 and "ModelError" in text
    assert not any(one in text for one in (*SECRETS, "correct-horse", "\x1b"))


def test_a_run_file_that_anybody_may_change_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("run.yaml")
    file.write_text(RUN_FILE)
    file.chmod(0o644)
    assert not resolve_plan(file).derived.warnings
    file.chmod(0o666)
    (note,) = resolve_plan(file).derived.warnings
    assert note.startswith("run.yaml can be changed by every user of this machine")
