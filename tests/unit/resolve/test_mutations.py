"""A24: whatever happens to a run file, it is a plan or a located error, never a traceback."""

from __future__ import annotations

import random

import pytest

from forge_cli.errors import ForgeError
from forge_cli.resolve.plan import Plan, dump_plan, explain, resolve_plan

BASE = """preset: qlora
model: {name: forge-tiny}
data:
  train: forge:quickstart/train
  max_length: 256
lora: {r: 32, target_modules: [q_proj, "self_attn.v_proj"]}
freeze: {first: 50%}
ema: {decay: 0.9}
training:
  learning_rate: 2e-4
  max_steps: 5
report: {prompts: ["a", b], samples: 0}
name: x
"""
BITS = [
    "yes",
    "null",
    "{}",
    "[]",
    "3",
    "-1",
    "1e999",
    ".nan",
    '"x"',
    "&a ",
    "*a",
    "!t ",
    "<<: ",
    "{",
    "}",
    "[",
    "]",
    ":",
    " ",
    "\n",
    "\t",
    "#",
    "- ",
    '"',
    "'",
    "|",
    ">",
    "%",
    "@",
    "? ",
    "---\n",
    "...",
    "\x00",
    "\u2028",
    "é",
    "True",
    "~",
    "9" * 400,
    "~x/y",
    "extends: x\n",
    "preset: sft\n",
    "\\",
    "../",
]


def mutate(text: str, dice: random.Random) -> str:
    place = dice.randrange(len(text) + 1)
    kind = dice.random()
    if kind < 0.5:
        return text[:place] + dice.choice(BITS) + text[place:]
    if kind < 0.8:
        return text[:place] + text[place + dice.randint(1, 8) :]
    lines = text.split("\n")
    row = dice.randrange(len(lines))
    lines[row] = lines[row].split(": ")[0] + ": " + dice.choice(BITS)
    return "\n".join(lines)


def resolve(path) -> Plan | ForgeError:
    try:
        return resolve_plan(path)
    except ForgeError as error:
        return error


@pytest.mark.parametrize("seed", range(4))
def test_mutants_never_end_in_a_traceback(write, seed):
    dice = random.Random(seed)
    plans = errors = 0
    for _ in range(100):
        text = BASE
        for _ in range(dice.randint(1, 3)):
            text = mutate(text, dice)
        outcome = resolve(write(text))
        if isinstance(outcome, Plan):
            plans += 1
            assert resolve_plan(write(dump_plan(outcome), "plan.yaml")).digest == outcome.digest, text
            assert all(str(one) for one in explain(outcome, ""))
        else:
            errors += 1
            assert all(one.where for one in outcome.problems), text
            assert all(len(str(one)) < 700 and "\0" not in str(one) for one in outcome.problems), text
    assert errors > 50 and plans > 0
