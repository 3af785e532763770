"""A plan in words: ``plan.yaml`` with the origin of every value, and who hid whom."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forge_cli.errors import ConfigError
from forge_cli.resolve.effect import Idle, find_idle, list_effective
from forge_cli.resolve.nearness import find_nearest
from forge_cli.resolve.scalars import ScalarFault, resolve_scalar
from forge_cli.resolve.schema_tree import find_field, find_sections, iterate_leaves, list_leaf_paths
from forge_cli.resolve.wording import printable, show, show_float

if TYPE_CHECKING:
    from forge_cli.resolve.layers import Origin
    from forge_cli.resolve.plan import Plan

_SAFE_WORD = re.compile(r"[A-Za-z0-9_./+%-]+")
_COMMENT_COLUMN = 44
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


@dataclass(frozen=True)
class Explanation:
    """Who said what about one setting.

    Attributes:
        path: Its dotted path.
        value: What counts; ``None`` also when its section is off.
        origin: Who said so.
        hidden: Whom that hid, strongest first.
        description: What the setting is.
        idle: Why it has no effect; empty when it has one.
    """

    path: str
    value: object
    origin: Origin
    hidden: tuple[Origin, ...]
    description: str
    idle: str

    def __str__(self) -> str:
        lines = [f"{self.path}: {show(self.value)}  ({self.origin.where})"]
        lines += [f"  hides {show(one.value)}  ({one.where})" for one in self.hidden]
        lines += [f"  has no effect: {self.idle}"] if self.idle else []
        return "\n".join([*lines, f"  {self.description}"])


def explain_path(plan: Plan, path: str) -> list[Explanation]:
    """Explains a setting, or every setting of a section; ``""`` explains all.

    Raises:
        ConfigError: There is no such setting.
    """
    if path in find_sections() and path:
        paths = [path] if getattr(plan.spec, path) is None else [one for one, _ in iterate_leaves(path)]
    elif path:
        if find_field(path) is None:
            near = find_nearest(path, [*list_leaf_paths(), *find_sections()])
            raise ConfigError(f"there is no setting {show(path)}", fix=f"did you mean {near}?" if near else "")
        paths = [path]
    else:
        paths = [one for one in list_leaf_paths() if plan.history.get(one)]
    idle = find_idle(plan.spec)
    return [_explain(plan, one, idle) for one in paths]


def _explain(plan: Plan, path: str, idle: dict[str, Idle]) -> Explanation:
    origins = plan.history.get(path) or plan.history[path.rpartition(".")[0]]
    section, _, name = path.rpartition(".")
    owner = getattr(plan.spec, section) if section else plan.spec
    value = getattr(owner, name, None)
    reason = idle[path].why if path in idle else ""
    if owner is None:
        reason = f"{section} is off"
    description = find_field(path).description or ""
    return Explanation(path, value, origins[-1], tuple(reversed(origins[:-1])), description, reason)


def render_plan(plan: Plan) -> str:
    """Writes a plan as a complete run file, every value with its origin.

    Returns:
        YAML text. Read as a run file it gives a plan with the same digest, whatever presets say by then.
        Settings without effect are comments.
    """
    spec = plan.spec
    lines = [
        f"# The whole plan of {printable(plan.source)}, as Forge read it; `forge train` takes this file too.",
        f"# digest: {plan.digest}",
    ]
    lines += [f"# {name}: {getattr(spec, name)}" for name in ("preset", "extends") if getattr(spec, name)]
    effective, idle = list_effective(spec), find_idle(spec)
    sections = find_sections()
    for name in type(spec).model_fields:
        if name in ("preset", "extends"):
            continue
        if name not in sections or getattr(spec, name) is None:
            lines.append(_render_line(name, getattr(spec, name), plan.origin(name).where))
            continue
        paths = [path for path, _ in iterate_leaves(name)]
        reasons = {idle[path].why for path in paths if path in idle}
        if len(reasons) == 1 and not any(path in effective for path in paths):
            lines.append(f"# {name} has no effect: {printable(reasons.pop())}")
            continue
        lines.append(f"{name}:" if any(path in effective for path in paths) else f"{name}: {{}}")
        for path in paths:
            key = path.rpartition(".")[2]
            if path in effective:
                lines.append(_render_line(f"  {key}", effective[path], plan.origin(path).where))
            else:
                lines.append(f"  # {key} has no effect: {printable(idle[path].why)}")
    return "\n".join(lines) + "\n"


def _render_line(key: str, value: object, where: str) -> str:
    return f"{f'{key}: {write_value(value)}':<{_COMMENT_COLUMN}}  # {printable(where)}"


def write_value(value: object) -> str:
    """Writes a value as YAML that :mod:`forge_cli.resolve.yaml_reader` reads back as the same value."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(write_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_value(key)}: {write_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return value if _is_plain(value) else _quote(value)
    return show_float(value) if isinstance(value, float) else json.dumps(value)


def _is_plain(text: str) -> bool:
    if not _SAFE_WORD.fullmatch(text) or text[0] in "-%.":
        return False
    try:
        return resolve_scalar(text) == text
    except ScalarFault:
        return False


def _quote(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", quoted)
