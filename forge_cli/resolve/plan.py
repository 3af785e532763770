"""From a run file to one frozen plan: after this nothing is decided, only done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from forge_cli.errors import ConfigError, ForgeError, Problem
from forge_cli.facts.layer_count import count_frozen_layers
from forge_cli.resolve.adapter_file import check_adapter_weights
from forge_cli.resolve.contradictions import find_contradictions, find_warnings
from forge_cli.resolve.effect import NOT_TRAINING, list_effective
from forge_cli.resolve.layers import Layers, Origin, stack_layers
from forge_cli.resolve.scene import Scene
from forge_cli.resolve.wording import show
from forge_cli.resolve.yaml_reader import Document, read_yaml
from forge_cli.schema.runspec import RunSpec

if TYPE_CHECKING:
    from forge_cli.facts.model_facts import ModelFacts
    from forge_cli.resolve.plan_text import Explanation

_PLACEHOLDERS = {"model.name": "unknown", "data.train": "unknown"}
_PYTHON = "settings"


class Derived(NamedTuple):
    """What follows from the settings.

    Attributes:
        effective_batch_size: Rows per optimizer step and device.
        num_frozen_layers: Decoder layers that ``freeze.first`` freezes; ``None`` when the model's shape is unknown.
        warnings: What is allowed but probably not meant.
        reasons: Name of a derived value to how it came about.
    """

    effective_batch_size: int
    num_frozen_layers: int | None
    warnings: tuple[str, ...]
    reasons: Mapping[str, str]


class Plan(NamedTuple):
    """One run, decided.

    Attributes:
        spec: Every setting.
        facts: Shape of the model; ``None`` when Forge does not know the model.
        derived: What follows from the settings.
        history: Dotted path to everybody who said something about it, weakest first.
        digest: SHA-256 of what determines the training.
        source: Name of the run file.
    """

    spec: RunSpec
    facts: ModelFacts | None
    derived: Derived
    history: Mapping[str, tuple[Origin, ...]]
    digest: str
    source: str

    def origin(self, path: str) -> Origin:
        """Returns who gave a setting its value.

        Raises:
            KeyError: There is no such setting in this plan.
        """
        return self.history[path][-1]


def resolve_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Resolves a run file.

    Args:
        path: The run file.
        overrides: ``path=value`` texts of ``--set``.

    Returns:
        The plan.

    Raises:
        ConfigError: Carries every problem of the file, the layers below it and the overrides.
    """
    return _resolve(read_yaml(Path(path)), overrides)


def read_plan(path: Path) -> Plan:
    """Reads the plan of a run that was carried out; the files that it names need not be there any more.

    Raises:
        ConfigError: It is no plan.
    """
    return _resolve(read_yaml(Path(path)), (), is_past=True)


def resolve_mapping(values: dict, overrides: Sequence[str] = ()) -> Plan:
    """Resolves settings given as nested dictionaries, as :func:`resolve_plan` does for a file."""
    return _resolve(Document(_PYTHON, _to_plain(values), {}), overrides)


def _to_plain(value: object) -> object:
    """Makes Python values look like YAML ones: tuples and paths have no notation of their own."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _resolve(document: Document, overrides: Sequence[str], *, is_past: bool = False) -> Plan:
    layers = stack_layers(document, overrides)
    problems = list(layers.problems)
    spec = _build_spec(layers, problems)
    model_error: ForgeError | None = None
    facts = None
    if spec is not None:
        facts, found, model_error = _look_at_model(spec, layers)
        scene = Scene(spec, facts, layers)
        if not is_past:
            problems += [*found, *find_contradictions(scene)]
    if problems or spec is None:
        # A broken model folder alone keeps its own exit code.
        kind = type(model_error) if model_error and len(problems) == len(model_error.problems) else ConfigError
        raise kind.from_problems(_sort(problems, document.file))
    history = MappingProxyType(
        {path: tuple(_freeze(one) for one in origins) for path, origins in layers.history.items()}
    )
    return Plan(spec, facts, _derive(scene), history, spec_digest(spec), document.file)


def _look_at_model(spec: RunSpec, layers: Layers) -> tuple[ModelFacts | None, list[Problem], ForgeError | None]:
    """Returns the model's facts, what is wrong with it and its adapter, and the first error of these."""
    facts, problems, first = None, [], None
    try:
        facts = _find_facts(spec, layers)
    except ForgeError as error:
        first = error
        problems += _locate(error, layers, "model.name")
    if spec.model.adapter and "model.adapter" not in layers.broken:
        try:
            check_adapter_weights(spec.model.adapter, facts)
        except ForgeError as error:
            first = first or error
            problems += _locate(error, layers, "model.adapter")
    return facts, problems, first


def _build_spec(layers: Layers, problems: list[Problem]) -> RunSpec | None:
    """Builds the spec; settings that cannot be used are reported, and left out so that the rest can be judged."""
    from pydantic import ValidationError

    for _ in range(2):
        try:
            return RunSpec.model_validate(layers.values)
        except ValidationError as error:
            from forge_cli.resolve.value_faults import explain_values

            found, bad = explain_values(error, layers)
            problems.extend(found)
            layers.broken |= bad
            _leave_out(layers.values, bad)
    return None


def _leave_out(values: dict, paths: set[str]) -> None:
    for path in paths:
        section, _, name = path.rpartition(".")
        owner = values[section] if section else values
        owner.pop(name, None)
        if path in _PLACEHOLDERS:
            owner[name] = _PLACEHOLDERS[path]


def _find_facts(spec: RunSpec, layers: Layers) -> ModelFacts | None:
    """Looks the model's shape up, unless its name is one of the problems."""
    if {"model", "model.name", "model.revision"} & layers.broken:
        return None
    from forge_cli.facts.model_facts import find_model_facts

    try:
        return find_model_facts(spec.model.name, spec.model.revision)
    except (OSError, RuntimeError, ValueError):  # ~nobody/model, or a name too long for the file system
        raise ConfigError(f"{show(spec.model.name)} is not a folder name", fix="name a folder that exists") from None


def _locate(error: ForgeError, layers: Layers, path: str) -> list[Problem]:
    """Places what is wrong with the model or the adapter at the line that names it."""
    where = layers.history[path][-1].where
    found = []
    for one in error.problems:
        what = f"{one.what} ({one.where})" if one.where else one.what
        found.append(Problem(where, path, what, one.why, one.fix))
    return found


def _sort(problems: list[Problem], file: str) -> list[Problem]:
    """Puts the run file's problems in the order of its lines, the others behind them."""

    def key(problem: Problem) -> tuple[int, int, int]:
        place = problem.where.removeprefix(file + ":").split(":")
        if problem.where.startswith(file) and place[0].isdigit():
            return 0, int(place[0]), int(place[1]) if place[1:] and place[1].isdigit() else 0
        return (0, 10**9, 0) if problem.where == file else (1, 0, 0)

    return sorted(problems, key=key)


def _freeze(origin: Origin) -> Origin:
    return Origin(origin.kind, origin.where, tuple(origin.value)) if isinstance(origin.value, list) else origin


def _derive(scene: Scene) -> Derived:
    spec, facts = scene.spec, scene.facts
    rows, steps = spec.training.per_device_train_batch_size, spec.training.gradient_accumulation_steps
    reasons = {"effective_batch_size": f"per_device_train_batch_size {rows} x gradient_accumulation_steps {steps}"}
    first = spec.freeze.first if spec.freeze else None
    if first is None:
        frozen: int | None = 0
        reasons["num_frozen_layers"] = "freeze.first is not given"
    elif facts is None:
        frozen = None if isinstance(first, str) else first
        reasons["num_frozen_layers"] = f"freeze.first {first}; the model's layers are counted when it is loaded"
    else:
        frozen = count_frozen_layers(first, facts.num_hidden_layers)
        reasons["num_frozen_layers"] = f"freeze.first {first} of {facts.num_hidden_layers} layers"
    return Derived(rows * steps, frozen, tuple(find_warnings(scene)), MappingProxyType(reasons))


def spec_digest(spec: RunSpec) -> str:
    """Computes the SHA-256 of the settings that determine the training, independent of how they were written."""
    import hashlib
    import json

    values = {path: _canonical(one) for path, one in list_effective(spec).items() if path not in NOT_TRAINING}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: object) -> object:
    """Gives equal numbers one notation: the schema's default 3 and the file's 3.0 are the same."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def dump_plan(plan: Plan) -> str:
    """Writes a plan as ``plan.yaml``; see :func:`forge_cli.resolve.plan_text.render_plan`."""
    from forge_cli.resolve.plan_text import render_plan

    return render_plan(plan)


def explain(plan: Plan, path: str) -> list[Explanation]:
    """Says who gave a setting its value and whom it hid; see :mod:`forge_cli.resolve.plan_text`."""
    from forge_cli.resolve.plan_text import explain_path

    return explain_path(plan, path)
