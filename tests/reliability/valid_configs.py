"""Random run files that are right: legal values of the schema, in random layouts.

What goes together is written down here a second time, from the documentation and not from ``forge_cli.resolve``, so
that a rule which refuses too much is found.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args, get_origin

from forge_cli.resolve.schema_tree import find_sections, list_members

REQUIRED = {"model": {"name": "forge-tiny"}, "data": {"train": "forge:quickstart/train", "max_length": 128}}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOSSES = {
    "dpo": ["sigmoid", "hinge", "ipo", "robust", "bco_pair", "apo_zero", ["sigmoid", "sft"]],
    "kto": ["kto", "apo_zero_unpaired"],
    "cpo": ["sigmoid", "hinge", "ipo", "simpo"],
}
METHOD_SETTINGS = {
    "dpo": ["beta", "precompute_ref_log_probs"],
    "kto": ["beta", "precompute_ref_log_probs", "desirable_weight", "undesirable_weight"],
    "orpo": ["beta"],
    "cpo": ["beta", "cpo_alpha"],
    "reward": ["center_rewards_coefficient"],
}
# Settings that need others beside them; `_add_dependent` writes these.
DEPENDENT = {
    "training": {"max_steps", "num_train_epochs", "warmup_steps", "train_sampling_strategy", "lr_scheduler_type"},
    "data": {"train", "eval", "eval_fraction", "eval_rows", "format", "max_length", "on_overlong", "max_lost_ratio"}
    | {"max_bad_ratio", "on_bad_row", "packing", "padding_free", "streaming", "train_on"},
    "lora": {"target_modules", "modules_to_save", "init_lora_weights", "lora_dropout"},
    "ema": {"update_after_step", "update_every"},
    "monitor": {"spike_ratio", "spike_window", "on_spike"},
    "checkpoint": {"save_steps"},
    "logging": {"logging_steps"},
    "model": {"name", "adapter", "chat_template", "revision", "dtype"},
}
OPTIONAL = ["ema", "monitor", "checkpoint", "report"]


class Raw(str):
    """A value written into the file as it is."""


class Text(NamedTuple):
    """A run file.

    Attributes:
        text: Its text.
        lines: Path of every key to the line that it stands on.
    """

    text: str
    lines: dict[tuple[str, ...], int]


def list_leaves() -> list[tuple[str, ...]]:
    """Lists the path of every setting, those of the sections included."""
    return [(s, name) if s else (name,) for s, one in find_sections().items() for name in one.model_fields]


def draw_value(section: str, name: str, dice: random.Random) -> object:
    """Draws a legal value from the annotation and the limits of a setting."""
    field = find_sections()[section].model_fields[name]
    member = dice.choice(list_members(field.annotation))
    if get_origin(member) is Literal:
        return dice.choice(get_args(member))
    if get_origin(member) is list:
        inner = get_args(member)[0]
        return [dice.choice(get_args(inner))] if get_origin(inner) is Literal else ["one", "two words"]
    limits = {key: getattr(one, key) for one in field.metadata for key in ("gt", "ge", "lt", "le") if hasattr(one, key)}
    low = limits.get("ge", limits.get("gt", 0))
    high = limits.get("le", limits.get("lt", low + 8))
    if member is int:
        return dice.choice([low, low + 1, dice.randint(low, min(high, low + 500))])
    if member is float:
        return dice.choice(
            [low + (high - low) * dice.uniform(0.01, 0.99), *[limits[k] for k in ("ge", "le") if k in limits]]
        )
    return {bool: dice.random() < 0.5, str: "some-text", type(None): None}[member]


def draw_settings(dice: random.Random) -> dict:
    """Draws the settings of one run, all legal and all with an effect."""
    if dice.random() < 0.12:
        return _draw_on_layers(dice)
    spec: dict = {key: dict(value) for key, value in REQUIRED.items()}
    spec["method"] = dice.choice(["sft"] * 5 + [*METHOD_SETTINGS])
    spec["seed"] = dice.choice([0, 1, 2**32 - 1, dice.randrange(10**6)])
    spec["training"] = {}
    if dice.random() < 0.7:
        spec["lora"] = {}
        if dice.random() < 0.5:
            spec["quantization"] = {"bits": 8} if dice.random() < 0.3 else {"bits": 4, "bnb_4bit_quant_type": "fp4"}
    for section in (*OPTIONAL, "logging"):
        if dice.random() < 0.6:
            spec[section] = {}
    _add_dependent(spec, dice)
    for section, settings in [(s, v) for s, v in spec.items() if isinstance(v, dict)]:
        skipped = DEPENDENT.get(section, set()) | {"bits", "bnb_4bit_quant_type"}
        names = [one for one in find_sections()[section].model_fields if one not in skipped]
        if section in ("report", "preference", "evaluation", "freeze") or settings == {"bits": 8}:
            continue  # written whole by `_add_dependent`, or without anything else to say
        for name in dice.sample(names, dice.randint(0, len(names))):
            settings[name] = draw_value(section, name, dice)
    if spec["method"] == "kto" and spec["training"].get("per_device_train_batch_size") == 1:
        spec["training"]["per_device_train_batch_size"] = 2
    for section in OPTIONAL:
        if (spec.get(section) == {} and dice.random() < 0.5) or (section not in spec and dice.random() < 0.3):
            spec[section] = None
    return spec


def _draw_on_layers(dice: random.Random) -> dict:
    preset = dice.choice(["lora", "qlora", "sft", "dora", "dpo", "kto", "orpo", "memory_efficient", "quickstart"])
    below = {"extends": "quickstart"} if preset == "quickstart" else {"preset": preset, **REQUIRED}
    return {**below, "seed": dice.randrange(99), "output_dir": "out/runs", "training": {"learning_rate": 3e-5}}


def _add_dependent(spec: dict, dice: random.Random) -> None:
    data, training, sft = spec["data"], spec["training"], spec["method"] == "sft"
    steps = dice.choice([None, None, 200, 1000])
    if steps is None:
        training["num_train_epochs"] = dice.choice([1, 3, 0.5, 2.5])
    else:
        training["max_steps"] = steps
    training["lr_scheduler_type"] = dice.choice(["cosine", "linear", "constant", "inverse_sqrt"])
    if training["lr_scheduler_type"] != "constant":
        training["warmup_steps"] = dice.choice([0, 0.1, 5, 100])
    data["max_length"] = dice.choice([8, 64, 512, dice.randint(8, 512)])
    data.update(dice.choice([{}, {"on_overlong": "drop", "max_lost_ratio": 0.2}, {"on_overlong": "truncate"}]))
    data.update(dice.choice([{}, {"on_bad_row": "skip", "max_bad_ratio": 1}, {"on_bad_row": "error"}]))
    streamed = sft and steps is not None and dice.random() < 0.2
    evaluation = [{}, {"eval": "forge:quickstart/heldout"}]
    evaluation += [] if streamed else [{"eval_fraction": 0.05}, {"eval_rows": 3}]
    data.update(dice.choice(evaluation))
    if streamed:
        data["streaming"] = True
    else:
        data["train"] = _draw_source(dice)
        if sft:
            data.update(dice.choice([{}, {"packing": True}, {"padding_free": True}, {"train_on": "all"}]))
        if spec["method"] != "kto" and not data.get("packing"):
            training["train_sampling_strategy"] = dice.choice(["random", "group_by_length"])
    _add_method(spec, dice)
    _add_adapters(spec, dice, sft)
    spec["model"].update(dice.choice([{}, {"dtype": "auto"}, {"dtype": "float32"}]))
    for section, name in (("checkpoint", "save_steps"), ("logging", "logging_steps")):
        if section in spec:
            spec[section][name] = dice.choice([1, 200, *(["epoch"] if section == "checkpoint" else [])])
    if "ema" in spec:
        spec["ema"].update(update_after_step=dice.choice([0, 100]), update_every=dice.choice([1, 10]))
    if "monitor" in spec:
        spec["monitor"].update(spike_ratio=dice.choice([1.5, 10]), spike_window=dice.choice([5, 150]))
        spec["monitor"]["on_spike"] = dice.choice(["warn", "skip", "stop"])  # rollback needs checkpoints
    evaluated = any(name in data for name in ("eval", "eval_fraction", "eval_rows"))
    if evaluated and dice.random() < 0.7:
        spec["evaluation"] = {"eval_steps": dice.choice(["epoch", 1, 200]), "per_device_eval_batch_size": 4}
    if spec["method"] == "reward":
        spec.pop("report", None)
    elif "report" in spec:
        spec["report"] = {"prompts": ["Who are you?", "a: b # c"], "max_new_tokens": 5}
        spec["report"].update({"samples": dice.choice([0, 2]), "exact_match": True} if evaluated else {})


def _draw_source(dice: random.Random) -> object:
    path = "forge:quickstart/train"
    source = {"path": path, "rows": dice.randint(1, 9), "weight": dice.choice([0.5, 2, 1000])}
    hub = {"path": "hf://org/rows@main", "split": "train[:5]", "columns": {"prompt": "question", "on": "off"}}
    return dice.choice([path, [path], source, [source, "forge:text/train"], [hub, source]])


def _add_method(spec: dict, dice: random.Random) -> None:
    method = spec["method"]
    if method not in METHOD_SETTINGS:
        return
    names = METHOD_SETTINGS[method]
    section = {name: draw_value("preference", name, dice) for name in dice.sample(names, dice.randint(0, len(names)))}
    if method in LOSSES:
        section["loss_type"] = dice.choice(LOSSES[method])
    if section:
        spec["preference"] = section


def _add_adapters(spec: dict, dice: random.Random, sft: bool) -> None:
    if "lora" in spec:
        modules = dice.sample(MODULES, dice.randint(1, 4))
        spec["lora"].update(
            target_modules=dice.choice(["all-linear", modules]), init_lora_weights=dice.choice([True, "gaussian"])
        )
        spec["lora"].update(dice.choice([{}, {"modules_to_save": ["embed_tokens"]}]))
        if sft and dice.random() < 0.5:
            spec["lora"]["lora_dropout"] = dice.choice([0, 0.05, 0.5])
    freeze: list[dict] = [{"first": 1}, {"first": 7}, {"first": "50%"}, {"patterns": ["*.mlp.*"]}]
    if "lora" not in spec:
        freeze += [{"embeddings": True}, {"first": 3, "embeddings": False}]
    if dice.random() < 0.4:
        spec["freeze"] = dice.choice(freeze)


def write_value(value: object, dice: random.Random) -> str:
    """Writes one value in flow style, in one of the notations that mean the same."""
    if isinstance(value, Raw):
        return str(value)
    if value is None:
        return dice.choice(["null", "~", "Null"])
    if isinstance(value, bool):
        return str(value) if dice.random() < 0.3 else str(value).lower()
    if isinstance(value, float):
        return dice.choice([repr(value), f"{value:.17e}"])
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_/.%-]*", value) and value.lower() not in ("on", "off", "none", "null")
        quoted = "'" + value.replace("'", "''") + "'"
        return dice.choice([quoted, json.dumps(value), *([value] * 4 if plain else [])])
    if isinstance(value, list):
        return "[" + ", ".join(write_value(one, dice) for one in value) + dice.choice(["]", " ]"])
    if isinstance(value, dict):
        inner = [f"{write_value(key, dice)}: {write_value(one, dice)}" for key, one in value.items()]
        return "{" + ", ".join(inner) + "}"
    return str(value)


def write_run_file(settings: dict, dice: random.Random, block: bool = False) -> Text:
    """Writes settings as a run file, in random order, style and spacing.

    Args:
        settings: Sections and settings.
        dice: Where the layout comes from.
        block: Whether every section stands in block style with two spaces, for faults in the layout itself.
    """
    rows: list[str] = ["---"] if not block and dice.random() < 0.1 else []
    lines: dict[tuple[str, ...], int] = {}
    for key, value in dice.sample(sorted(settings.items()), len(settings)):
        rows += dice.choice([[], [], [""], ["# a comment: {with [brackets"]])
        lines[key,] = len(rows) + 1
        style = "block" if block else dice.choice(["block", "block", "flow", "tall"])
        if not isinstance(value, dict) or not value or style == "flow":
            for inner in value if isinstance(value, dict) else ():
                lines[key, inner] = len(rows) + 1
            rows.append(f"{key}: {write_value(value, dice)}{'' if block else dice.choice(['', ' # why', '  '])}")
            continue
        rows.append(f"{key}:" + (" {" if style == "tall" else ""))
        indent = "  " if block else " " * dice.choice([1, 2, 4])
        for inner, one in _iterate_rows(value, rows, dice, block):
            lines[key, inner] = len(rows) + 1
            rows.append(f"{indent}{inner}: {write_value(one, dice)}{',' if style == 'tall' else ''}")
        rows += ["}"] if style == "tall" else []
    end = "\n" if block else dice.choice(["\n", "\n", "\r\n"])
    return Text(("" if block or dice.random() > 0.1 else "\ufeff") + end.join(rows) + end, lines)


def _iterate_rows(value: dict, rows: list[str], dice: random.Random, block: bool) -> Iterator[tuple[str, object]]:
    for item in dice.sample(sorted(value.items(), key=lambda one: one[0]), len(value)):
        rows += [] if block else dice.choice([[], [], [""], ["# between"]])
        yield item
