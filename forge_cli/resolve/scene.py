"""What a contradiction is judged on: the settings, the model's shape, and who said what."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from forge_cli.resolve.layers import RANKS, Layers

if TYPE_CHECKING:
    from forge_cli.facts.model_facts import ModelFacts
    from forge_cli.schema.runspec import RunSpec


class Clash(NamedTuple):
    """Settings that do not go together.

    Attributes:
        paths: Every setting the judgement rests on, the one to blame first.
        what: What is wrong.
        fix: What to write instead.
        why: Why it matters.
    """

    paths: tuple[str, ...]
    what: str
    fix: str
    why: str = ""


class Scene(NamedTuple):
    """One run before it becomes a plan."""

    spec: RunSpec
    facts: ModelFacts | None
    layers: Layers

    def rank(self, path: str) -> int:
        """Returns how strong the layer is that a value comes from."""
        origins = self.layers.history.get(path)
        return RANKS[origins[-1].kind] if origins else 0

    def is_deliberate(self, path: str, causes: tuple[str, ...]) -> bool:
        """Tells whether somebody wrote a setting in the face of the others.

        What a stronger layer made pointless (``--set training.max_steps=3`` for a trial) is hidden, not wrong.
        """
        rank = self.rank(path)
        return rank >= RANKS["file"] and all(rank >= self.rank(cause) for cause in causes)

    def is_judgeable(self, clash: Clash) -> bool:
        """Tells whether nothing that a clash rests on has a problem of its own already."""
        broken = self.layers.broken
        # Nobody knows what a preset or recipe that was not found would have said.
        if {"preset", "extends"} & broken and any(self.rank(path) < RANKS["file"] for path in clash.paths):
            return False
        return not any(path in broken or path.rpartition(".")[0] in broken for path in clash.paths)

    def place(self, paths: tuple[str, ...]) -> tuple[str, str]:
        """Returns place and path of the setting that the strongest layer gave."""
        blamed = max(paths, key=self.rank)
        origins = self.layers.history.get(blamed)
        known = origins and origins[-1].kind != "default"
        return (origins[-1].where if known else self.layers.source), blamed
