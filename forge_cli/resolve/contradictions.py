"""Settings that are fine alone and wrong together. Each rule is a small function that yields clashes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from forge_cli.errors import Problem
from forge_cli.resolve.effect import find_idle
from forge_cli.resolve.rules_data import DATA_RULES
from forge_cli.resolve.rules_preference import PREFERENCE_RULES, warn_about_preferences
from forge_cli.resolve.rules_training import TRAINING_RULES, warn_about_ema
from forge_cli.resolve.rules_weights import WEIGHT_RULES
from forge_cli.resolve.scene import Clash, Scene
from forge_cli.resolve.wording import printable

if TYPE_CHECKING:
    from forge_cli.resolve.effect import Idle

Rule = Callable[[Scene], Iterator[Clash]]


def find_contradictions(scene: Scene) -> list[Problem]:
    """Applies every rule.

    Args:
        scene: The settings to judge; rules that rest on settings with problems of their own are silent.

    Returns:
        The problems, each at the setting the strongest layer gave.
    """
    clashes = [clash for rule in RULES for clash in rule(scene) if scene.is_judgeable(clash)]
    return [_to_problem(scene, clash) for clash in clashes]


def _to_problem(scene: Scene, clash: Clash) -> Problem:
    where, path = scene.place(clash.paths)
    return Problem(where, path, clash.what, clash.why, clash.fix)


def find_idle_settings(scene: Scene) -> Iterator[Clash]:
    """Finds settings that somebody wrote on purpose and that have no effect."""
    for path, idle in find_idle(scene.spec).items():
        if scene.is_deliberate(path, idle.causes):
            yield _to_clash(path, idle)


def _to_clash(path: str, idle: Idle) -> Clash:
    return Clash((path, *idle.causes), "has no effect", idle.fix, why=idle.why)


def find_warnings(scene: Scene) -> Iterator[str]:
    """Finds what is allowed but probably not meant."""
    yield from warn_about_ema(scene.spec, scene.spec.training.max_steps)
    yield from warn_about_preferences(scene.spec)
    yield from _warn_about_permissions(scene.layers.source)


def _warn_about_permissions(source: str) -> Iterator[str]:
    """Warns of a run file that anybody on the machine may change between check and run."""
    try:
        is_open = os.stat(source).st_mode & stat.S_IWOTH
    except (OSError, ValueError):  # settings of a Python caller
        return
    if is_open:
        yield f"{printable(source)} can be changed by every user of this machine; type `chmod o-w` and its name"


RULES: tuple[Rule, ...] = (find_idle_settings, *WEIGHT_RULES, *DATA_RULES, *TRAINING_RULES, *PREFERENCE_RULES)
