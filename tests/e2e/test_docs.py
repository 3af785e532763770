"""What README, CONTRIBUTING and docs say is carried out or parsed: commands, run files, Python, links."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import docs_reference
import pytest
import yaml
from docs_blocks import (
    SHELL,
    Block,
    list_anchors,
    list_blocks,
    list_code,
    list_commands,
    list_links,
    list_pages,
)
from docs_folder import ROOT, RUN_FILE, PageFolder, complete, read_settings
from docs_shell import IMPORTS, IMPORTS_OF_WEIGHTS, OF_WEIGHTS, PYTHON, Shell, choose_arguments, parse

import forge_cli
from forge_cli.resolve.plan import resolve_plan
from forge_cli.resolve.schema_tree import find_sections

PAGES = list_pages()
BLOCKS = [block for page in PAGES for block in list_blocks(page)]
REFERENCE = ROOT / "docs" / "reference"
SECTIONS = find_sections()
NAMED = re.compile(r"# ([\w./-]+\.ya?ml)\b")
QUESTION = "Tell me about the delobin.\n"
FOLDERS = ("docs/", "tests/", "recipes/", "configs/", "forge_cli/")


class Shells(NamedTuple):
    """An interpreter for commands that need no torch, one for those that load weights, and what the latter has done."""

    quick: Shell
    heavy: Shell
    done: set[tuple[str, ...]]


@pytest.fixture(scope="module")
def shells() -> Iterator[Shells]:
    shells = Shells(Shell(*IMPORTS), Shell(*IMPORTS_OF_WEIGHTS), set())
    yield shells
    for shell in (shells.quick, shells.heavy):
        shell.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shells: Shells) -> Path:
    """The folder of a run of three steps, trained once."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"path": f"forge:quickstart/{name}", "rows": 8} for name in ("train", "heldout")]
    settings = {**yaml.safe_load(RUN_FILE), "data": {"train": rows[0], "eval": rows[1], "max_length": 128}}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    code, _, err = shells.heavy.run(folder, ["train", "run.yaml", "--quiet"])
    assert code == 0, err
    return folder / "runs" / "run"


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PageFolder:
    """A page's own folder; the working folder of the test."""
    made = PageFolder(tmp_path / "page", finished)
    monkeypatch.chdir(made.path)
    return made


def write_run_file(block: Block, folder: PageFolder) -> Path:
    """Writes a run file as a page shows it, under the name in its first line, and the rows that it names."""
    settings = complete(read_settings(block.text) or {})
    method = str(settings.get("method") or settings.get("preset") or "")
    data = settings.get("data") or {}
    for key in ("train", "eval"):
        sources = data.get(key) or []
        for source in sources if isinstance(sources, list) else [sources]:
            one = source if isinstance(source, dict) else {"path": source}
            folder.write_rows(one["path"], method, one.get("columns"))
    adapter = (settings.get("model") or {}).get("adapter")
    if adapter:
        folder.add_run(str(Path(adapter).parent))
    name = NAMED.match(block.text)
    file = folder.path / (name[1] if name else "block.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = settings == yaml.safe_load(block.text)
    file.write_text(block.text if whole else yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def test_pages_hold_something_to_check():
    languages = {block.language for block in BLOCKS}
    assert len(PAGES) >= 4 and "yaml" in languages
    assert sum(len(list_commands(block)) for block in BLOCKS if block.language in SHELL) >= 10


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark], ids=lambda block: block.place)
def test_what_is_not_run_says_why(block: Block):
    assert block.mark == "run" or len(block.reason.split()) >= 2, f"{block.place}: <!-- not run: reason -->"


@pytest.mark.parametrize("page", [page for page in PAGES if "reference/" not in page])
def test_commands_and_run_files_of_a_page(page: str, folder: PageFolder, shells: Shells):
    faults = []
    for block in list_blocks(page):
        if block.language in ("yaml", "yml"):
            faults += check_run_file(block, folder)
        elif block.language in SHELL:
            faults += [fault for command in list_commands(block) for fault in check_command(command, folder, shells)]
    assert not faults, "\n\n".join(faults)


def check_run_file(block: Block, folder: PageFolder) -> list[str]:
    """Resolves a run file, or a fragment of one over a small run file."""
    if block.mark == "not run":  # perhaps a file of another tool, which a command of the page reads
        if name := NAMED.match(block.text):
            (folder.path / name[1]).write_text(block.text, encoding="utf-8")
        return []
    if read_settings(block.text) is None:
        return [f"{block.place}: no run file; put <!-- not run: what it is --> above it"]
    # The adapter that lies here is one of the embedded model.
    overrides = ["model.name=forge-tiny", "data.max_length=128"] if "adapter:" in block.text else []
    try:
        resolve_plan(write_run_file(block, folder), overrides)
    except Exception as error:
        return [f"{block.place}: {error}"]
    return []


def check_command(command, folder: PageFolder, shells: Shells) -> list[str]:
    """Runs what is quick, parses what is not; other programs need their files and targets."""
    program, *words = command.words
    if program != "forge":
        return check_other_program(command)
    words = [word for word in words if word != "--debug"]
    try:
        name, params = parse(words)
    except Exception as error:
        return [f"{command.place}: forge {' '.join(words)}: {getattr(error, 'message', error)}"]
    arguments = choose_arguments(name, params, words, command.mark)
    if arguments is None or command.fails or command.mark == "not run":
        return []
    folder.prepare(name, params)
    arguments = [*arguments, *folder.name_trained_model(params)]
    trains = name == "train" and command.mark == "run"
    if name not in OF_WEIGHTS and not trains:
        code, out, err = shells.quick.run(folder.path, arguments)
    elif tuple(arguments) in shells.done:  # on another page, with the same run
        return []
    else:
        shells.done.add(tuple(arguments))
        code, out, err = shells.heavy.run(folder.path, arguments, QUESTION)
    if command.target:
        (folder.path / command.target).write_text(out, encoding="utf-8")
    return [f"{command.place}: forge {' '.join(arguments)}: exit {code}\n{out[-500:]}{err[-1500:]}"] if code else []


def check_other_program(command) -> list[str]:
    """``make`` needs a target that is there, ``python`` a file."""
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        wrong = [word for word in words if "=" not in word and not word.startswith("-") and word not in targets]
        return [f"{command.place}: make {word}: no such target" for word in wrong]
    files = [word.partition("::")[0] for word in words if word.startswith(FOLDERS)]
    return [f"{command.place}: {file} is not there" for file in files if not (ROOT / file).exists()]


def test_a_renamed_option_and_a_wrong_run_file_are_found(folder: PageFolder, shells: Shells):
    text = """
```bash
forge train run.yaml --dry-running
forge data chek run.yaml
forge resume runs/run --set lora.rank=3
forge presets show lor
make everything
```
```yaml
lora: {rank: 8}
```
"""
    shell_block, yaml_block = list_blocks("page.md", text)
    faults = [fault for command in list_commands(shell_block) for fault in check_command(command, folder, shells)]
    assert len(faults) == 5
    assert "--dry-running" in faults[0] and "did you mean lora" in faults[3]
    assert "lora.r" in check_run_file(yaml_block, folder)[0]


@pytest.mark.parametrize("page", PAGES)
def test_code_in_the_text_of_a_page(page: str):
    """Commands in running text have a real name and real options; files are there."""
    faults = []
    for code in list_code(page):
        words = code.split()
        if code.startswith("forge ") and not set("|<>[]") & set(code):
            faults += [f"{page}: `{code}`: {fault}" for fault in find_wrong_words(words[1:])]
        elif words[0] == "make" and len(words) == 2 and f"\n{words[1]}:" not in (ROOT / "Makefile").read_text():
            faults.append(f"{page}: `{code}`: no such target")
        files = [word.partition("::")[0].rstrip(",") for word in words if word.startswith(FOLDERS)]
        faults += [f"{page}: `{file}` is not there" for file in files if not is_there(file)]
    assert not faults, "\n".join(faults)


def is_there(file: str) -> bool:
    """Tells whether a file of the repository exists; a name to be filled in (NAME.yaml) and a folder are no file."""
    return "." not in file or "NAME" in file or any(ROOT.glob(file))


def find_wrong_words(words: list[str]) -> list[str]:
    """Lists the names of commands and options that there are not; what a command lacks is no fault in a sentence."""
    commands, path = docs_reference.list_all_commands(), "forge"
    while words and hasattr(commands[path], "list_summaries") and not words[0].startswith("-"):
        path, words = f"{path} {words[0]}", words[1:]
        if words[:1] == ["..."] or path == "forge COMMAND":
            return []
        if path not in commands:
            return [f"there is no {path}"]
    options = {name for one in commands[path].params for name in one.opts} | {"--help", "--debug"}
    return [f"{path} has no {word}" for word in words if word.startswith("--") and word.split("=")[0] not in options]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    faults = []
    for link in list_links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        if not file.exists():
            faults.append(f"{page}: {link}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in list_anchors(str(file.resolve().relative_to(ROOT))):
            faults.append(f"{page}: {link}: no such heading")
    assert not faults, "\n".join(faults)


SCRIPTS = [block for block in BLOCKS if block.language in ("python", "py") and block.mark != "not run"]


def test_python_of_the_pages_compiles_and_its_imports_are_there(shells: Shells, tmp_path: Path):
    names = []
    for block in SCRIPTS:
        for node in ast.walk(ast.parse(block.text, block.place)):
            if isinstance(node, ast.Import):
                names += [(one.name, "") for one in node.names]
            elif isinstance(node, ast.ImportFrom):
                names += [(node.module or "", one.name) for one in node.names if block.mark != "run"]
    lacking = {module for module, _ in names if importlib.util.find_spec(module.partition(".")[0]) is None}
    assert not lacking
    assert not {name for module, name in names if module == "forge_cli"} - set(forge_cli.__all__)
    rooms = sorted({(module, name) for module, name in names if module.startswith("forge_cli.")})
    if rooms:
        script = "\n".join(f"from {module} import {name}" for module, name in rooms if name)
        code, _, err = shells.heavy.run(tmp_path, [PYTHON, script])
        assert code == 0, err


@pytest.mark.parametrize("block", [one for one in SCRIPTS if one.mark == "run"], ids=lambda block: block.place)
def test_python_that_is_marked_runs(block: Block, folder: PageFolder, shells: Shells):
    for other in list_blocks(block.page):
        if other.language == "yaml" and other.mark != "not run" and other.text.startswith("# "):
            write_run_file(other, folder)
    code, _, err = shells.heavy.run(folder.path, [PYTHON, block.text])
    assert code == 0, err


@pytest.mark.parametrize("name", ["settings.md", "presets.md", "cli.md"])
def test_reference_is_what_the_code_says(name: str):
    text, file = docs_reference.render_pages()[name], REFERENCE / name
    if os.environ.get("FORGE_UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"{name} is out of date; FORGE_UPDATE_GOLDEN=1 rewrites it"


def test_reference_names_every_setting_preset_and_command():
    settings = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    for name, section in SECTIONS.items():
        for key in section.model_fields:
            assert f"`{name}.{key}` (" in settings or f"`{key}` (" in settings or f"[`{key}`]" in settings, key
    presets = (REFERENCE / "presets.md").read_text(encoding="utf-8")
    assert presets.count("\n## ") == len(list((ROOT / "configs" / "presets").glob("*.yaml")))
    commands = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    assert all(f"\n## {words}\n" in commands for words in docs_reference.list_all_commands())
