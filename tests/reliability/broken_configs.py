"""Run files with one fault each, and what Forge has to say about them: `python tests/reliability/broken_configs.py`.

Every broken file knows the line of its fault, and for a mistyped name the right one. `--json` prints the counts.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_origin

from faults_of_text import CONTRADICTIONS, FOREIGN, Case, spoil_layout, spoil_whole_files
from valid_configs import REQUIRED, Raw, draw_settings, list_leaves, write_run_file

from forge_cli.errors import ConfigError
from forge_cli.resolve.plan import resolve_plan
from forge_cli.resolve.schema_tree import find_sections, list_members
from forge_cli.resolve.unknown_keys import load_foreign_keys

NUM_VALID = 300
NUM_PROCESSES = 20
_SUGGESTION = re.compile(r"did you mean ([\w.-]+)\?|(?:Forge calls it|belongs under \w+:|top level:) ([\w.]+)")


class Verdict(NamedTuple):
    """What Forge said about a case; ``problems`` counts what it named."""

    case: Case
    rejected: bool
    crashed: str
    line_right: bool
    meant_right: bool
    problems: int
    said: str


def mistype(word: str, dice: random.Random) -> Iterator[str]:
    """Yields a word with a character dropped, doubled, swapped or replaced, and in another case."""
    place, pair = dice.randrange(len(word)), dice.randrange(max(1, len(word) - 1))
    yield word[:place] + word[place + 1 :]
    yield word[:place] + word[place] + word[place:]
    yield word[:pair] + word[pair : pair + 2][::-1] + word[pair + 2 :]
    yield word[:place] + dice.choice("abcdefghijklmnopqrstuvwxyz") + word[place + 1 :]
    yield dice.choice([word.upper(), word.capitalize(), word.title().replace("_", ""), word.replace("_", "-")])


def put(settings: dict, path: tuple[str, ...], value: object) -> dict:
    """Returns settings with one more in them; the sections on the way are made."""
    spec = {key: dict(one) if isinstance(one, dict) else one for key, one in settings.items()}
    if len(path) == 1:
        return {**spec, path[0]: value}
    # A section that is not there yet needs these beside it.
    if path[0] == "quantization" and not spec.get("quantization"):
        spec["lora"] = spec.get("lora") or {}
    if spec.get("lora") is not None or path[0] == "lora":
        spec |= {"freeze": {"first": 1}} if spec.get("freeze") else {}
    spec[path[0]] = {**(spec.get(path[0]) or ({"first": 1} if path[0] == "freeze" else {})), path[1]: value}
    return spec


def make(kind: str, settings: dict, path: tuple[str, ...], dice: random.Random, meant: str = "") -> Case:
    """Writes settings with the fault at a path."""
    written = write_run_file(settings, dice)
    return Case(kind, written.text.encode(), (written.lines[path],), meant)


def mistype_keys(dice: random.Random) -> Iterator[Case]:
    """Mistypes every key of the schema in every way, where the result is no other known name."""
    foreign = load_foreign_keys()
    for path in list_leaves():
        *section, name = path
        siblings = find_sections()[section[0] if section else ""].model_fields
        every = {one[-1] for one in list_leaves()}
        for wrong in mistype(name, dice):
            if wrong in siblings or wrong in every or wrong.lower() in foreign or wrong in ("", "y", "n"):
                continue
            settings = draw_settings(dice)
            value = settings.pop(name, 1) if not section else 1
            if section:
                inner = settings.get(section[0]) or {}
                settings[section[0]] = {key: one for key, one in inner.items() if key != name}
            kind = "key mistyped, one letter" if len(name) > 4 else "key mistyped, short name"
            yield make(kind, put(settings, (*section, wrong), value), (*section, wrong), dice, name)


def misplace_keys(dice: random.Random) -> Iterator[Case]:
    """Puts settings into sections that have no such setting; some are known there under another name."""
    foreign, names = load_foreign_keys(), [one[-1] for one in list_leaves()]
    for path in list_leaves():
        others = [one for one in find_sections() if path[-1] not in find_sections()[one].model_fields and one]
        others = [one for one in others if f"{one}.{path[-1]}" not in foreign]
        if len(path) == 2 and names.count(path[-1]) == 1:
            wrong = (dice.choice(others), path[-1])
            yield make("right key, wrong section", put(draw_settings(dice), wrong, 1), wrong, dice, ".".join(path))


def use_foreign_keys(dice: random.Random) -> Iterator[Case]:
    """Uses keys of other tools."""
    for name, meant in FOREIGN.items():
        path = tuple(name.split("."))
        yield make("key of another tool", put(draw_settings(dice), path, 1), path, dice, meant)


def mistype_values(dice: random.Random) -> Iterator[Case]:
    """Gives every setting values of other types, and numbers outside its limits."""
    for path in list_leaves():
        field = find_sections()[path[0] if len(path) == 2 else ""].model_fields[path[-1]]
        members = list_members(field.annotation)
        kinds = {get_origin(one) or one for one in members}
        wrong: list[object] = [{"a": 1}] if path[-1] not in ("train", "eval", "columns") else [3]
        if len(path) == 1 and path[0] in find_sections():
            wrong = [3, ["a"], Raw("some words"), True]
        elif not kinds & {str, list}:
            wrong += ["some words", [1]] + ([] if bool in kinds else [True]) + ([] if kinds & {int, float} else [77])
        elif str in kinds and int not in kinds:
            wrong += [3, 0.5, True, Raw("yes"), Raw("010")]
        elif kinds & {list} and Literal not in kinds:
            wrong += ["q_proj", 3, [1, 2]]
        if int in kinds and str not in kinds:
            wrong += [1.5, "3"]
        for value in wrong:
            yield make("value of another type", put(draw_settings(dice), path, value), path, dice)
        words = {"gt": (0, -1), "ge": (-1, -99), "lt": (0, 1), "le": (1, 99)}
        limits = [
            (getattr(one, word), steps) for word, steps in words.items() for one in field.metadata if hasattr(one, word)
        ]
        outside: list[object] = [limit + step for limit, steps in limits for step in steps]
        outside += [Raw(".nan"), Raw(".inf"), Raw("1e999")] if kinds & {int, float} and str not in kinds else []
        for value in outside:
            yield make("number out of range", put(draw_settings(dice), path, value), path, dice)


def contradict(dice: random.Random) -> Iterator[Case]:
    """Writes settings that are fine alone; either one may be blamed, a setting without effect only itself."""
    for paths, extra in CONTRADICTIONS:
        for _ in range(2):
            spec = {key: dict(value) for key, value in REQUIRED.items()}
            for path, value in extra.items():
                section, _, name = path.partition(".")
                spec[section] = {**(spec.get(section) or {}), name: value} if name else value
            written = write_run_file(spec, dice)
            lines = tuple(written.lines[tuple(path.split("."))] for path in paths.split())
            yield Case("contradiction", written.text.encode(), lines)


def make_cases(seed: int = 0) -> Iterator[Case]:
    """Makes all cases, valid ones last; the same seed makes the same files."""
    makers = [
        mistype_keys,
        misplace_keys,
        use_foreign_keys,
        mistype_values,
        contradict,
        spoil_layout,
        spoil_whole_files,
    ]
    for maker in makers:
        yield from maker(random.Random(f"{seed} {maker.__name__}"))
    for number in range(NUM_VALID):
        dice = random.Random(f"{seed} valid {number}")
        yield Case("valid", write_run_file(draw_settings(dice), dice).text.encode())


def judge(case: Case, place: Path) -> Verdict:
    """Resolves a case and compares what is said with what is known."""
    place.write_bytes(case.text)
    try:
        resolve_plan(place, case.overrides)
        return Verdict(case, False, "", False, False, 0, "")
    except ConfigError as error:
        first = error.problems[0]
        crashed = "" if error.exit_code == 2 else f"exit code {error.exit_code}"
        said, count = "\n".join(map(str, error.problems)), len(error.problems)
    except Exception:
        return Verdict(case, False, traceback.format_exc(), False, False, 0, "")
    start = first.where.removeprefix(f"{place}:")
    line = int(start.split(":")[0]) if start[:1].isdigit() else 0
    right = line in case.lines if case.lines else first.where in (str(place), "--set") if line == 0 else False
    named = [one or two for one, two in _SUGGESTION.findall(first.fix)]
    return Verdict(case, True, crashed, right, case.meant in named, count, said)


def time_processes(cases: list[Case], place: Path) -> list[tuple[Case, int, str, float]]:
    """Runs `forge config validate` for some of the cases: exit code, what it printed, seconds."""
    found = []
    for case in cases:
        place.write_bytes(case.text)
        command = [sys.executable, "-m", "forge_cli", "config", "validate", str(place)]
        command += [part for one in case.overrides for part in ("--set", one)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        found.append((case, done.returncode, done.stdout + done.stderr, time.perf_counter() - start))
    return found


def run_campaign(seed: int = 0) -> dict:
    """Judges all cases in an empty folder and counts."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        place, cases = Path("run.yaml"), list(make_cases(seed))
        verdicts = [judge(case, place) for case in cases]
        broken = [one for one in cases if one.kind != "valid"]
        processes = time_processes(random.Random(seed).sample(broken, NUM_PROCESSES), place)
        strange = sorted(one.name for one in Path().iterdir() if one != place)
        os.chdir("/")
    kinds: dict[str, list[Verdict]] = defaultdict(list)
    for one in verdicts:
        kinds[one.case.kind].append(one)
    seconds = sorted(one[3] for one in processes)
    bad = [
        one for one in verdicts if (one.case.kind != "valid" and not (one.rejected and one.line_right)) or one.crashed
    ]
    bad += [
        one
        for one in verdicts
        if (one.case.kind == "valid" and one.rejected) or (one.case.meant and not one.meant_right)
    ]
    failures = [{"kind": one.case.kind, "text": repr(one.case.text[:3000]), "lines": one.case.lines,
                 "meant": one.case.meant, "set": one.case.overrides, "said": one.said or one.crashed}
                for one in bad]  # fmt: skip
    processes_bad = [said for _, code, said, _ in processes if code != 2 or "Traceback" in said]
    return {
        "kinds": {kind: _count(ones) for kind, ones in kinds.items()},
        "torch": any(one in sys.modules for one in ("torch", "transformers", "datasets")),
        "strange_files": strange, "failures": failures, "processes": len(processes), "processes_bad": processes_bad,
        "seconds_95": round(seconds[int(0.95 * len(seconds)) - 1], 3),
    }  # fmt: skip


def _count(ones: list[Verdict]) -> dict[str, int]:
    named = [one for one in ones if one.case.meant]
    return {
        "files": len(ones),
        "rejected": sum(one.rejected for one in ones),
        "line": sum(one.line_right for one in ones),
        "names": len(named),
        "name": sum(one.meant_right for one in named),
        "alone": sum(one.problems == 1 for one in ones),
        "crashed": sum(bool(one.crashed) for one in ones),
    }


def print_table(result: dict) -> None:
    """Prints the counts, one row per kind of fault."""
    kinds = result["kinds"]
    total = {key: sum(one[key] for kind, one in kinds.items() if kind != "valid") for key in kinds["valid"]}
    print(
        f"{'fault':32}{'files':>7}{'rejected':>10}{'line right':>12}{'name right':>13}{'one problem':>13}{'crashed':>9}"
    )
    for kind, one in [*kinds.items(), ("all broken", total)]:
        name = f"{one['name']}/{one['names']}" if one["names"] else ""
        print(
            f"{kind:32}{one['files']:>7}{one['rejected']:>10}{one['line']:>12}{name:>13}{one['alone']:>13}{one['crashed']:>9}"
        )
    bad, many = len(result["processes_bad"]), result["processes"]
    print(f"torch imported: {result['torch']}; {many} processes, {bad} not exit 2 or with a traceback, ", end="")
    print(f"95th percentile {result['seconds_95']} s; files made: {result['strange_files'] or 'none'}")


if __name__ == "__main__":
    campaign = run_campaign()
    print(json.dumps(campaign)) if "--json" in sys.argv else print_table(campaign)
