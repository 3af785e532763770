"""Makes the preferences and the text that ship with Forge: facts told in an order that is liked better or worse.

The embedded model describes a creature in four sentences and begins with any of them. In these pairs the better answer
begins with where the creature lives, the worse one with something else; words and facts are the same, so the model
finds both about equally likely and has nothing to go by but the pairs. The held-out pairs are about creatures that
are in no training pair. ``rated`` and ``rated-heldout`` hold one answer of each pair with its label; ``text`` tells the
same facts as running text, a page of a field guide a row.

Example::

    python recipes/tiny_preference.py forge_cli/assets
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

from tiny_base import DESCRIBE_PROMPTS, FACT_ANSWERS, FIELDS, HELDOUT, IT_SAYS, SEED, Creature, fill, make_world

LIKED_FIRST = "home"
PAIRS_PER_CREATURE = 2


def tell(creature: Creature, order: list[str]) -> str:
    """Tells all facts of a creature in one order, in the plainest of the base's sentences."""
    sentences = [FACT_ANSWERS[order[0]][0], *(IT_SAYS[field][0] for field in order[1:])]
    return " ".join(sentences).format(**dataclasses.asdict(creature))


def make_pair(rng: random.Random, creature: Creature) -> dict[str, list[dict[str, str]]]:
    """Makes one pair; what follows the first sentence is in any order, in both answers."""
    others = [field for field in FIELDS if field != LIKED_FIRST]
    better = [LIKED_FIRST, *rng.sample(others, len(others))]
    first = rng.choice(others)
    rest = [field for field in FIELDS if field != first]
    worse = [first, *rng.sample(rest, len(rest))]
    return {
        "prompt": [{"role": "user", "content": fill(rng, DESCRIBE_PROMPTS, creature)}],
        "chosen": [{"role": "assistant", "content": tell(creature, better)}],
        "rejected": [{"role": "assistant", "content": tell(creature, worse)}],
    }


def rate(rng: random.Random, pairs: list[dict]) -> list[dict]:
    """Takes one answer of each pair, with whether it is liked."""
    labels = [rng.random() < 0.5 for _ in pairs]
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}
        for pair, label in zip(pairs, labels, strict=True)
    ]


def make_pages(rng: random.Random, creatures: list[Creature]) -> list[dict[str, str]]:
    """Makes pages of a field guide, two creatures each."""
    told = [f"{one.name.capitalize()}\n\n{tell(one, rng.sample(sorted(FIELDS), len(FIELDS)))}" for one in creatures]
    return [{"text": "\n\n".join(told[i : i + 2])} for i in range(0, len(told), 2)]


def main() -> None:
    """Writes ``preference`` and ``text`` into the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rng = random.Random(SEED + 7)
    world = make_world()
    known, heldout = world[:-HELDOUT], world[-HELDOUT:]
    train = [make_pair(rng, creature) for creature in known for _ in range(PAIRS_PER_CREATURE)]
    rng.shuffle(train)
    held_back = [make_pair(rng, creature) for creature in heldout]
    files = {
        "preference/train": train,
        "preference/heldout": held_back,
        "preference/rated": rate(rng, train),
        "preference/rated-heldout": rate(rng, held_back),
        "text/train": make_pages(rng, known),
        "text/heldout": make_pages(rng, heldout),
    }
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
