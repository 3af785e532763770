"""Which options of ``forge estimate`` go together: one that would be ignored is an error."""

from __future__ import annotations

from collections.abc import Mapping

from forge_cli.errors import ConfigError

_PLAN = {"RUN_FILE", "--model", "--set"}
_DEVICE = {"--gpu", "--memory", "--sharding"}
# What each question looks at beside itself. The others are about one run, in full.
_USED = {
    "--calibrate": {"RUN_FILE", "--json"},
    "--max": _PLAN | _DEVICE | {"--json"},
    "--plot": _PLAN | _DEVICE | {"--sweep"},
    "--sweep": _PLAN | _DEVICE | {"--plot", "--json"},
    "--fits": _PLAN | {"--sharding", "--json"},
    "--trace": _PLAN | {"--json"},
}
_TIME = ("--price", "--tokens", "--data")
_CLASHES = (
    *(((one, "--memory"), "time needs a GPU by name", "write --gpu NAME instead of --memory") for one in _TIME),
    *(
        ((one, "--sharding"), "the time of several ranks is not estimated", f"leave {one} or --sharding out")
        for one in _TIME
    ),
    (("--data", "--tokens"), "both say how many tokens an epoch has", "give one of them"),
    (("--data", "--model"), "a model has no rows", "give a run file, or --tokens N"),
)


def check_options(given: Mapping[str, object]) -> None:
    """Refuses options that contradict each other, or that the question would ignore.

    Args:
        given: Option to value; ``None``, ``False`` and empty lists are not given.

    Raises:
        ConfigError: Names both options.
    """
    names = [name for name, value in given.items() if value is not None and value is not False and value != []]
    for question, used in _USED.items():
        for other in names if question in names else ():
            if other != question and other not in used:
                raise ConfigError(
                    f"{question} would ignore {other}", fix=f"leave {other} out, or ask without {question}"
                )
    for (one, other), why, fix in _CLASHES:
        if one in names and other in names:
            raise ConfigError(f"{one} and {other} do not go together", why=why, fix=fix)


def read_axes(texts: list[str]) -> list[tuple[str, list[str]]]:
    """Reads every ``PATH=A,B`` of ``--sweep``; commas inside brackets belong to a value.

    Raises:
        ConfigError: One names no values, or two name the same setting.
    """
    axes = [_read_axis(one) for one in texts]
    paths = [path for path, _ in axes]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"--sweep names {path} twice", fix=f"write all its values once: --sweep {path}=A,B,C")
    return axes


def _read_axis(written: str) -> tuple[str, list[str]]:
    path, separator, values = written.partition("=")
    found = [one.strip() for one in _split(values) if one.strip()]
    if not separator or not found or not path.strip():
        raise ConfigError(f"--sweep {written} names no values", fix="write --sweep data.max_length=1024,2048,4096")
    return path.strip(), found


def _split(values: str) -> list[str]:
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
