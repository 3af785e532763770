"""The ``forge`` command as a user meets it: listings, help, messages and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from forge_cli.paths import data_root
from forge_cli.version import __version__

GOLDEN = Path(__file__).parents[1] / "golden"
COMMAND = [sys.executable, "-m", "forge_cli"]
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONUTF8": "1"}
RUN_FILE = "preset: lora\nmodel: {name: mistral-7b}\ndata: {train: rows.jsonl}\ntraining: {learning_rate: 1e-4}\n"


def forge(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=60
    )


def succeed(*arguments: str, folder: Path | None = None) -> str:
    done = forge(*arguments, folder=folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def compare_with_golden(name: str, text: str) -> None:
    """Compares with a file under tests/golden; FORGE_UPDATE_GOLDEN=1 rewrites it."""
    file = GOLDEN / name
    if os.environ.get("FORGE_UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"{file.name} differs; FORGE_UPDATE_GOLDEN=1 rewrites it"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (tmp_path / "run.yaml").write_text(RUN_FILE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "data",
        "data check",
        "data preview",
        "data parity",
        "config",
        "config show",
        "config explain",
        "config validate",
        "config schema",
        "presets",
        "presets show",
        "recipes",
        "recipes copy",
        "models",
        "estimate",
    ],
)
def test_help(command: str):
    name = command.replace(" ", "-") or "forge"
    compare_with_golden(f"help/{name}.txt", succeed(*command.split(), "--help"))


def test_version_is_that_of_the_package():
    import tomllib

    project = tomllib.loads((GOLDEN.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    assert succeed("--version") == f"forge {__version__}\n"


def test_presets_list_is_plain_text_or_json():
    names = sorted(path.stem for path in (data_root() / "configs" / "presets").glob("*.yaml"))
    lines = succeed("presets", "list").splitlines()
    assert [line.split()[0] for line in lines] == names
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1, "the summaries stand in one column"
    rows = json.loads(succeed("presets", "list", "--json"))
    assert [row["name"] for row in rows] == names
    assert all(row["summary"] for row in rows)


@pytest.mark.parametrize("preset", ["sft", "lora", "qlora", "memory_efficient"])
def test_preset_is_shown_with_reasons(preset: str):
    text = succeed("presets", "show", preset)
    compare_with_golden(f"presets/{preset}.txt", text)
    shown = json.loads(succeed("presets", "show", preset, "--json"))
    values = yaml.safe_load((data_root() / "configs" / "presets" / f"{preset}.yaml").read_text(encoding="utf-8"))
    assert {row["path"]: row["value"] for row in shown["values"]} == {
        f"{section}.{key}": value for section, keys in values.items() for key, value in keys.items()
    }
    assert text.count("Source: ") == len(shown["values"])


def test_recipes_are_listed_shown_and_copied(tmp_path: Path):
    rows = json.loads(succeed("recipes", "list", "--json"))
    if not rows:
        pytest.skip("no recipes are shipped yet")
    assert [line.split()[0] for line in succeed("recipes", "list").splitlines()] == [row["name"] for row in rows]
    name, file = rows[0]["name"], rows[0]["file"]
    text = succeed("recipes", "show", name)
    assert text == (data_root() / "recipes" / file).read_text(encoding="utf-8")
    assert succeed("recipes", "copy", name, folder=tmp_path).strip().endswith(file)
    copy = tmp_path / file
    assert copy.read_text(encoding="utf-8") == text
    copy.write_text("mine", encoding="utf-8")
    refused = forge("recipes", "copy", name, folder=tmp_path)
    assert refused.returncode == 5 and "--force" in refused.stderr
    assert copy.read_text(encoding="utf-8") == "mine"
    succeed("recipes", "copy", name, "--force", folder=tmp_path)
    assert copy.read_text(encoding="utf-8") == text
    succeed("recipes", "copy", name, "other.txt", folder=tmp_path)
    assert (tmp_path / "other.txt").read_text(encoding="utf-8") == text


def test_models_are_listed():
    rows = json.loads(succeed("models", "list", "--json"))
    assert len(rows) >= 72
    (mistral,) = [row for row in rows if row["name"] == "mistral-7b-v0.1"]
    assert mistral["num_parameters"] == 7_241_732_096
    lines = succeed("models", "list").splitlines()
    assert lines[0].split() == ["alias", "parameters", "layers", "hub", "name"]
    assert len(lines) == len(rows) + 1
    assert any(line.split() == ["mistral-7b-v0.1", "7.24", "B", "32", "mistralai/Mistral-7B-v0.1"] for line in lines)


def test_valid_run_file(run_folder: Path):
    assert succeed("config", "validate", "run.yaml", folder=run_folder).startswith("run.yaml is valid, plan ")
    report = json.loads(succeed("config", "validate", "run.yaml", "--json", folder=run_folder))
    assert report["valid"] is True and len(report["digest"]) == 64


def test_invalid_run_file_names_every_problem_on_stderr(run_folder: Path):
    (run_folder / "bad.yaml").write_text(RUN_FILE.replace("learning_rate", "lr") + "sead: 3\n", encoding="utf-8")
    done = forge("config", "validate", "bad.yaml", folder=run_folder)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: bad.yaml:") for line in lines[::2])
    assert all(line.startswith("  fix: ") for line in lines[1::2])
    as_json = forge("config", "validate", "bad.yaml", "--json", folder=run_folder)
    assert (as_json.returncode, as_json.stderr) == (2, "")
    report = json.loads(as_json.stdout)
    assert report["valid"] is False and len(report["problems"]) == 2


def test_shown_plan_is_a_run_file_with_the_same_digest(run_folder: Path):
    (run_folder / "plan.yaml").write_text(succeed("config", "show", "run.yaml", folder=run_folder), encoding="utf-8")
    digests = {
        json.loads(succeed("config", "validate", file, "--json", folder=run_folder))["digest"]
        for file in ("run.yaml", "plan.yaml")
    }
    assert len(digests) == 1
    shown = json.loads(succeed("config", "show", "run.yaml", "--json", "--set", "lora.r=4", folder=run_folder))
    assert shown["spec"]["lora"]["r"] == 4
    assert shown["digest"] not in digests


def test_explanation_names_the_winner_and_whom_it_hides(run_folder: Path):
    text = succeed("config", "explain", "run.yaml", "training.learning_rate", folder=run_folder)
    assert "run.yaml:4" in text and "preset lora" in text
    arguments = [
        "config",
        "explain",
        "run.yaml",
        "training.learning_rate",
        "--json",
        "--set",
        "training.learning_rate=3e-4",
    ]
    (row,) = json.loads(succeed(*arguments, folder=run_folder))
    assert (row["value"], row["origin"]["kind"]) == (3e-4, "set")
    assert [origin["kind"] for origin in row["hides"]] == ["file", "preset", "default"]
    wrong = forge("config", "explain", "run.yaml", "training.learning_rat", folder=run_folder)
    assert wrong.returncode == 2 and "learning_rate" in wrong.stderr


def test_json_schema_accepts_run_files_and_describes_every_key():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(succeed("config", "schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for file in (data_root() / "configs" / "presets").glob("*.yaml"):
        validator.validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    validator.validate(
        {"extends": "quickstart", "model": {"revision": "main"}, "freeze": {"first": "50%"}, "ema": None}
    )
    for wrong in ({"lr": 1}, {"lora": {"rank": 4}}, {"lora": {"r": "4"}}, {"training": {"optim": "adam"}}):
        assert not validator.is_valid(wrong), wrong
    sections = [section for section in schema["$defs"].values() if "properties" in section]
    assert len(sections) >= 10
    for section in sections:
        assert all(field.get("description") for field in section["properties"].values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["preset", "list"], "'presets'"),
        (["presets", "lst"], "'list'"),
        (["presets", "list", "--yaml"], "--yaml"),
        (["presets", "show"], "forge presets show --help"),
        (["presets", "show", "lor"], "did you mean lora"),
        (["recipes", "show", "qqqqq"], "forge recipes list"),
        (["train"], "forge init"),
    ],
)
def test_usage_errors_are_one_line_with_a_fix_and_exit_2(arguments: list[str], words: str):
    done = forge(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    error, fix = done.stderr.splitlines()
    assert error.startswith("error: ") and fix.startswith("  fix: ") and words in done.stderr


def test_group_without_command_shows_its_help():
    done = forge("presets")
    assert done.returncode == 2
    assert "show" in done.stderr and "error" not in done.stderr


def test_unforeseen_failure_is_one_line_unless_debugging(monkeypatch, capsys):
    from forge_cli.cli import app, models

    def fail() -> None:
        """Fail."""
        raise RuntimeError("no idea")

    monkeypatch.setattr(models, "FUNCTIONS", {"list": fail})
    for arguments, traceback_shown in ((["models", "list"], False), (["models", "list", "--debug"], True)):
        with pytest.raises(SystemExit) as stop:
            app.run_app(arguments)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert "internal error: RuntimeError: no idea" in error
        assert ("Traceback" in error) is traceback_shown
        assert ("--debug" in error) is not traceback_shown


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (EOFError, 130)])
def test_stopping_is_no_failure_of_forge(monkeypatch, capsys, stop, code):
    from forge_cli.cli import app, models

    def interrupted() -> None:
        """Stop."""
        raise stop

    monkeypatch.setattr(models, "FUNCTIONS", {"list": interrupted})
    with pytest.raises(SystemExit) as end:
        app.run_app(["models", "list"])
    assert end.value.code == code
    assert "stopped by the user" in capsys.readouterr().err


def test_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, "models", "list"], stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=60
    )
    os.close(writer)
    assert done.stderr == b""
