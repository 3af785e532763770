"""The command around it: what it writes, refuses and prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forge_cli.cli import app

TEXT = """
base_model: forge-tiny
datasets: [{path: "forge:quickstart/train", type: chat_template}]
sequence_len: 128
micro_batch_size: 2
learning_rate: 1e-3
deepspeed: zero2.json
"""


@pytest.fixture
def forge(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(app.COMMANDS, "migrate", ("forge_cli.cli.migrate", "Turn a file of another tool into one."))
    Path("other.yaml").write_text(TEXT, encoding="utf-8")

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            app.run_app(["migrate", *arguments])
        return stop.value.code, *capsys.readouterr()

    return run


def test_it_writes_a_run_file_and_prints_the_account(forge):
    code, out, err = forge("other.yaml")
    assert (code, err) == (0, "")
    assert "a file of Axolotl (told by base_model" in out
    assert "not supported: 1 key\n  deepspeed: several devices" in out
    assert "wrote run.yaml: 6 keys of 7 carried" in out
    assert "\x1b" not in out
    assert "  learning_rate: 0.001                            # learning_rate\n" in Path("run.yaml").read_text()
    assert sorted(path.name for path in Path().iterdir()) == ["other.yaml", "run.yaml"]


def test_nothing_is_written_over(forge):
    Path("run.yaml").write_text("mine", encoding="utf-8")
    code, _, err = forge("other.yaml")
    assert code == 2 and "--force" in err and Path("run.yaml").read_text() == "mine"
    assert forge("other.yaml", "--force")[0] == 0
    code, _, err = forge("other.yaml", "--output", "other.yaml", "--force")
    assert code == 2 and Path("other.yaml").read_text() == TEXT
    assert forge("other.yaml", "-o", "nowhere/run.yaml")[0] == 2
    assert forge("other.yaml", "-o", ".")[0] == 2


def test_json_is_the_account_and_nothing_else(forge):
    code, out, _ = forge("other.yaml", "--json")
    said = json.loads(out)
    assert code == 0 and said["tool"] == "Axolotl" and said["output"] == "run.yaml" and not said["problems"]
    assert {one["key"]: one["kind"] for one in said["keys"]}["deepspeed"] == "not supported"
    assert said["run_file"] == Path("run.yaml").read_text()


def test_what_does_not_validate_is_shown_and_not_written(forge):
    Path("other.yaml").write_text(TEXT.replace("forge:quickstart/train", "rows.jsonl"), encoding="utf-8")
    code, out, err = forge("other.yaml")
    assert code == 2 and not Path("run.yaml").exists()
    assert "error: other.yaml:3:" in err and "no such file: rows.jsonl" in err
    assert "deepspeed" in out
    code, out, _ = forge("other.yaml", "--json")
    assert code == 2 and json.loads(out)["problems"][0]["path"] == "data.train"


def test_what_a_terminal_should_not_get_is_escaped(forge):
    Path("other.yaml").write_text(
        TEXT + '"a\\eb": 1\nrl: ""\n"c\\nd": hf_abcdefghijklmnopqrstuvwxyz\n', encoding="utf-8"
    )
    _, out, err = forge("other.yaml")
    assert "\x1b" not in out + err and "a\\x1bb" in out and "hf_abc" not in out


def test_it_needs_no_torch(tmp_path):
    (tmp_path / "other.yaml").write_text(TEXT, encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from forge_cli.start.migrate import migrate; "
        "from forge_cli.run.folder import write_atomic; migrate(Path('other.yaml')); "
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
