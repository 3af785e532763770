"""``forge completion``: what a shell offers behind ``forge`` when Tab is pressed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from forge_cli.errors import ConfigError, MachineError

# What may follow, and what it is.
Candidate = tuple[str, str]


def completion(
    context: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False)],
    words: Annotated[list[str] | None, typer.Argument(metavar="WORD", hidden=True)] = None,
    install: Annotated[bool, typer.Option("--install", help="Write the script where the shell looks for it.")] = False,
) -> None:
    """Print the script with which a shell completes forge.

    Try it with eval "$(forge completion bash)"; keep it with forge completion bash --install.
    """
    if shell == "words":  # what the scripts ask: what may follow these words; half a line is no place for messages
        with contextlib.suppress(Exception):
            for value, text in _complete(context, words or [""]):
                print(f"{value}\t{' '.join(text.split())}" if text else value)
        return
    from forge_cli.cli.completion_scripts import SCRIPTS

    if shell not in SCRIPTS:
        raise ConfigError(f"there is no completion for {shell}", fix="write one of bash, zsh and fish")
    with contextlib.suppress(Exception):
        _load_index()  # so that the first Tab does not wait for it
    if install:
        _install(shell, *SCRIPTS[shell])
    else:
        print(SCRIPTS[shell].text, end="")


def _install(shell: str, text: str, place: str, hint: str) -> None:
    """Writes the script to where the shell looks; no start-up file is changed."""
    data, config = (os.environ.get(f"XDG_{one}_HOME") for one in ("DATA", "CONFIG"))
    file = Path(place.format(data=data or "~/.local/share", config=config or "~/.config")).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"the script cannot be written: {error.strerror}", where=str(file)) from None
    print(file)
    print(hint.format(file=file), file=sys.stderr)


def _complete(context: typer.Context, words: list[str]) -> Iterable[Candidate]:
    command, option, place, current = context.find_root().command, None, 0, words[-1]
    path: list[str] = []
    for word in words[:-1]:
        if hasattr(command, "list_summaries"):
            if not word.startswith("-"):
                command = command.get_command(context, word)
                path.append(word)
            if command is None:
                return ()
        elif option is not None:
            option = None
        elif word.startswith("-"):
            option = _find_option(command, word)
        else:
            place += 1
    if option is not None:
        found = _list_values(option, current)
    elif current.startswith("-"):
        found = _list_options(command)
    elif hasattr(command, "list_summaries"):
        found = command.list_summaries()
    else:
        found = _list_arguments(command, path, place, current)
    return _starting(found, current)


def _starting(found: Iterable[Candidate], current: str) -> list[Candidate]:
    return [one for one in found if one[0].startswith(current)]


def _find_option(command: Any, word: str) -> str | None:
    """Returns the name of an option that takes the next word as its value."""
    if "=" in word:
        return None
    param = next((one for one in command.params if word in one.opts), None)
    return None if param is None or getattr(param, "is_flag", False) else word


def _list_options(command: Any) -> Iterator[Candidate]:
    for param in command.params:
        for name in param.opts if param.param_type_name == "option" else ():
            if name.startswith("--"):
                yield name, getattr(param, "help", None) or ""
    yield "--help", "Show the help of this command."


def _list_arguments(command: Any, path: list[str], place: int, current: str) -> Iterable[Candidate]:
    """Lists what a word without an option may be; nothing leaves it to the shell, which knows files."""
    params = [one for one in command.params if one.param_type_name == "argument"]
    metavar = (params[min(place, len(params) - 1)].metavar or "").strip("[].") if params else ""
    if metavar == "NAME":
        return {"presets": _list_presets, "recipes": _list_recipes, "models": _list_models}.get(path[0], tuple)()
    if metavar == "RUN":
        return [(os.path.join("runs", name), "") for name in _list_runs()]
    if metavar == "SETTING":
        return [(name.removesuffix("="), text) for name, text in _list_settings(current)]
    if metavar == "SHELL":
        return [(shell, "") for shell in ("bash", "zsh", "fish")]
    return ()


def _list_values(option: str, current: str) -> Iterable[Candidate]:
    """Lists the values of an option."""
    if option in ("--set", "--sweep"):
        path, separator, _ = current.partition("=")
        return [(f"{path}={one}", text) for one, text in _list_choices(path)] if separator else _list_settings(current)
    if option == "--allow-change":
        return [(name.removesuffix("="), text) for name, text in _list_settings(current)]
    known = {"--model": _list_models, "--preset": _list_presets, "--gpu": _list_gpus, "--data": _list_data}
    if option == "--max":
        return [(one, "") for one in ("batch", "length", "rank")]
    return known.get(option, tuple)()


def _list_settings(current: str) -> list[Candidate]:
    """Lists settings as ``training.optim=``; without a dot, sections as ``training.``, unless it is just one."""
    index = _load_index()
    sections = [name for name in index["sections"] if name.startswith(current) or current.startswith(name)]
    plain = [path for path in index["settings"] if "." not in path and path.startswith(current)]
    if len(sections) == 1 and not plain:
        plain = [path for path in index["settings"] if path.startswith(sections[0])]
        sections = []
    found = [(f"{path}=", index["settings"][path][0]) for path in plain]
    return found + [(name, index["sections"][name]) for name in sections]


def _list_choices(path: str) -> Iterable[Candidate]:
    """Lists the values of a setting that has a few."""
    shelves = {"preset": _list_presets, "extends": _list_recipes, "model.name": _list_models}
    shelves |= {"data.train": _list_data, "data.eval": _list_data}
    if path in shelves:
        return shelves[path]()
    return [(one, "") for one in _load_index()["settings"].get(path, ("", ()))[1]]


def _load_index() -> dict[str, dict]:
    """Loads the settings' names, kept in a file: importing the schema takes longer than all the rest of an answer."""
    import json

    from forge_cli import schema
    from forge_cli.paths import cache_root
    from forge_cli.version import __version__

    folder = os.path.dirname(schema.__file__)
    changed = max(os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder))
    file = cache_root() / f"settings-{__version__}-{changed}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = _build_index()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob("settings-*.json"):
            old.unlink(missing_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(index), encoding="utf-8")
        os.replace(draft, file)
    return index


def _build_index() -> dict[str, dict]:
    from forge_cli.cli.plugin_search import skip_plugin_search

    skip_plugin_search()
    from forge_cli.schema.runspec import RunSpec

    index: dict[str, dict] = {"settings": {}, "sections": {}}
    for name, field in RunSpec.model_fields.items():
        inner = _find_section(field.annotation)
        if inner is None:
            index["settings"][name] = [field.description or "", _list_literals(field.annotation)]
            continue
        index["sections"][f"{name}."] = field.description or (inner.__doc__ or "").partition("\n")[0]
        for key, one in inner.model_fields.items():
            index["settings"][f"{name}.{key}"] = [one.description or "", _list_literals(one.annotation)]
    return index


def _find_section(annotation: Any) -> Any:
    from typing import get_args

    kinds = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
    return next((one for one in kinds if hasattr(one, "model_fields")), None)


def _list_literals(annotation: Any) -> list[str]:
    from typing import Literal, get_args, get_origin

    kinds = [annotation, *get_args(annotation)]
    values = [str(one) for kind in kinds if get_origin(kind) is Literal for one in get_args(kind)]
    return values + (["true", "false"] if bool in kinds else [])


def _list_presets() -> list[Candidate]:
    from forge_cli.cli.shelf import list_shelf

    return [(name, summary) for name, summary, _ in list_shelf("configs/presets")]


def _list_recipes() -> list[Candidate]:
    from forge_cli.cli.shelf import list_shelf

    return [(name, summary) for name, summary, _ in list_shelf("recipes", (".yaml", ".py"))]


def _list_models() -> list[Candidate]:
    from forge_cli.facts.shelf import list_aliases

    return [("forge-tiny", ""), *((name, "") for name in list_aliases())]


def _list_gpus() -> list[Candidate]:
    from forge_cli.facts.gpus import list_gpus
    from forge_cli.units import format_bytes

    return [(gpu.name, f"{format_bytes(gpu.usable_bytes)} usable") for gpu in list_gpus()]


def _list_data() -> list[Candidate]:
    from forge_cli.resolve.sources import list_embedded_data

    return [(f"forge:{name}", "ships with Forge") for name in list_embedded_data()]


def _list_runs() -> list[str]:
    try:
        return sorted(one for one in os.listdir("runs") if os.path.isfile(os.path.join("runs", one, "run.json")))
    except OSError:
        return []


FUNCTIONS = {"completion": completion}
