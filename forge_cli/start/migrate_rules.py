"""What several keys of another tool say together: model, adapters, number formats, steps, trackers."""

from __future__ import annotations

import re
from pathlib import Path

from forge_cli.errors import ConfigError, ForgeError
from forge_cli.resolve.wording import show
from forge_cli.start.migrate_draft import DECIDED, DIFFERS, UNNEEDED, UNSUPPORTED, Draft

_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_TRACKING_URI"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MLP = ["gate_proj", "up_proj", "down_proj"]
_MOST = 10**8


def settle(draft: Draft) -> None:
    """Turns the facts of a draft into settings; its method is known already."""
    _settle_model(draft)
    _settle_adapter(draft)
    _settle_precision(draft)
    _settle_length(draft)
    _settle_interval(draft, "eval", "evaluation.eval_steps")
    _settle_interval(draft, "save", "checkpoint.save_steps")
    _settle_trackers(draft)


def is_number(value: object, least: float = 0) -> bool:
    """Tells whether a value is a finite number that is not below another one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= _MOST


def _settle_model(draft: Draft) -> None:
    template = draft.look(".template_file")
    for key in draft.pop(".template_file"):
        if isinstance(template, str) and template.endswith((".jinja", ".jinja2", ".j2", ".txt")):
            draft.carry("model.chat_template", template, key)
        else:
            draft.leave(key, UNSUPPORTED, "write the template into a file and name it in model.chat_template")
    name = draft.look(".run_name")
    for key in draft.pop(".run_name"):
        if isinstance(name, str) and _NAME.fullmatch(name):
            draft.carry("name", name, key)
        else:
            draft.leave(key, DIFFERS, "a run's name has letters, digits, . _ - only; it takes that of the run file")
    if ".model" in draft.facts:
        _settle_torchtune_model(draft)


def _settle_torchtune_model(draft: Draft) -> None:
    """Finds the hub name behind a builder and a folder; the builder's name says whether there are adapters."""
    builder = str(draft.look(".model")).rpartition(".")[2]
    kind, _, model = builder.partition("_") if builder.startswith(("lora_", "qlora_")) else ("", "", builder)
    folder, owners = str(draft.look(".checkpoint_dir", "")), draft.table["owners"]
    base = Path(folder).name
    owner = next((owners[one] for one in sorted(owners, key=len, reverse=True) if base.startswith(one)), None)
    hub = f"{owner}/{base}" if owner else draft.table["models"].get(model)
    keys = draft.pop(".model", ".checkpoint_dir")
    is_here = folder.isprintable() and len(folder) < 1000 and (Path(folder) / "config.json").is_file() and folder
    if not is_here and hub is None:
        fix = "put a folder that exists into checkpointer.checkpoint_dir"
        raise ConfigError(f"no hub name is known for {show(builder)}", where=draft.source.where(keys[0]), fix=fix)
    draft.carry("model.name", folder if is_here else hub, *keys)
    if not is_here:
        draft.note("model.name", f"its folder is not here, so the hub's model is named: {hub}")
    for key in draft.pop(".checkpointer"):
        draft.leave(key, DECIDED, "weights are read from safetensors as the hub has them")
    if kind:
        draft.facts[".adapter"] = (kind, keys[0])


def _settle_adapter(draft: Draft) -> None:
    """Switches LoRA and quantisation on or off."""
    kind = draft.look(".adapter", draft.tool == "llama-factory")
    keys = draft.pop(".adapter")
    kind = {True: "lora", False: "full"}[kind] if isinstance(kind, bool) else kind
    if kind not in ("lora", "qlora", "full", "freeze"):
        where = draft.source.where(keys[0])
        raise ConfigError(f"Forge has no adapter {show(kind)}", where=where, fix="lora, qlora and full can be carried")
    if kind == "qlora" and "quantization.bits" not in draft.values:
        draft.values["quantization.bits"] = 4
    if "quantization.bits" not in draft.values:
        draft.drop_section("quantization", "the weights are not quantised")
    if kind in ("lora", "qlora"):
        draft.carry("lora", {}, *keys)
        _settle_targets(draft)
    else:
        draft.drop_section("lora", "the whole model is trained, without adapters")
        for key in draft.pop(".targets", ".target_linear", ".attn_modules", ".lora_mlp", ".lora_output"):
            draft.leave(key, UNNEEDED, "the whole model is trained, without adapters")
        if kind == "freeze":
            _settle_freeze(draft, keys)
        elif keys:
            draft.carry("lora", None, *keys)
    for key in draft.pop(".last_layers"):
        draft.leave(key, UNNEEDED, "nothing is frozen")


def _settle_targets(draft: Draft) -> None:
    """Names the layers that carry adapters."""
    value, everything = draft.look(".targets", draft.look(".attn_modules", [])), draft.look(".target_linear") is True
    names = [one.strip() for one in value.split(",")] if isinstance(value, str) else value
    names = [str(one).replace("output_proj", "o_proj") for one in names] if isinstance(names, list) else []
    names += _MLP if names and draft.look(".lora_mlp") is True else []
    has_output = "lm_head" in names or draft.look(".lora_output") is True
    keys = draft.pop(".targets", ".target_linear", ".attn_modules", ".lora_mlp", ".lora_output")
    path, is_pattern = "lora.target_modules", any(not re.fullmatch(r"[\w.-]+", one) for one in names)
    names = [one for one in names if one != "lm_head"]
    if everything or is_pattern or set(names) & {"all", "all-linear", "all_linear"}:
        draft.carry(path, "all-linear", *keys)
        if is_pattern:
            draft.note(path, "a pattern is no list of names: all linear layers get an adapter")
    elif names:
        draft.carry(path, names, *keys)
    else:
        for key in keys:
            draft.leave(key, UNNEEDED, "it names no layer that carries an adapter")
        if draft.tool != "llama-factory":
            model = str(draft.values.get("model.name", "")).lower()
            found = next(targets for part, targets in draft.shared["targets"].items() if part in model)
            draft.values[path] = list(found)
            draft.note(path, f"no targets are named; PEFT takes {', '.join(found)}, Forge all linear layers")
    if has_output:
        draft.note(path, "lm_head carries no adapter here; modules_to_save: [lm_head] trains it whole")


def _settle_freeze(draft: Draft, keys: list) -> None:
    """Turns "train the last N layers" into "freeze the first ones"."""
    from forge_cli.facts.model_facts import find_model_facts

    last = draft.look(".last_layers", 2)
    try:
        facts = find_model_facts(str(draft.values.get("model.name", "")))
    except (ForgeError, OSError, RuntimeError, ValueError):
        facts = None
    if facts is None or type(last) is not int or not 0 < last < facts.num_hidden_layers:
        fix = "write finetuning_type: full there and freeze: {first: 50%} in the run file"
        what = "how many layers are frozen cannot be told for this model"
        raise ConfigError(what, where=draft.source.where(keys[0]), fix=fix)
    draft.carry("freeze.first", facts.num_hidden_layers - last, *keys, *draft.pop(".last_layers"))
    draft.note("freeze.first", "embeddings are frozen as there; norm and output layer, frozen there, are trained here")


def _settle_precision(draft: Draft) -> None:
    """Chooses the compute format, and that of trained weights."""
    full = draft.values.get("lora") is None
    names = (".bf16", ".fp16", ".pure_bf16", ".pure_fp16", ".dtype")
    bf16, fp16, pure_bf16, pure_fp16, dtype = (draft.look(one) for one in names)
    if bf16 in (True, "full", "true") or pure_bf16 is True or dtype == "bf16":
        chosen = "bf16"
    elif bf16 == "auto":
        chosen = "auto"
    else:
        chosen = "fp16" if fp16 in (True, "true") or pure_fp16 is True or dtype == "fp16" else "fp32"
    used = [one for one in names if draft.look(one) not in (None, False)] or [".bf16", ".fp16"]
    keys = draft.pop(*used)
    if keys and (chosen != "fp32" or draft.values.get("model.dtype", "float32") == "float32"):
        draft.carry("training.precision", chosen, *keys)
    else:
        for key in keys:
            draft.leave(key, DIFFERS, "Forge computes in bf16 or fp16 where the weights are")
    for key in draft.pop(*names):
        draft.leave(key, UNNEEDED, "it is off")
    as_loaded = draft.tool in ("axolotl", "torchtune") and full and chosen in ("bf16", "auto") and keys
    if pure_bf16 is True or as_loaded:
        draft.carry("model.dtype", "bfloat16", *keys[:1])
        draft.note("model.dtype", "weights are trained in bfloat16 there; auto keeps float32 masters") if full else None
    elif not keys and draft.tool == "llama-factory":
        draft.note(
            "training.precision", "without bf16 or fp16 it computes as the model is stored; Forge's auto does not"
        )
    if draft.tool == "trl" and "model.dtype" not in draft.values and not full:
        draft.note("model.dtype", "without dtype TRL loads float32 weights; auto loads the base in the compute format")


def _settle_length(draft: Draft) -> None:
    """Warm-up, length of the run, and rows of a step."""
    steps, ratio = draft.look_number(".warmup_steps"), draft.look_number(".warmup_ratio")
    if not steps and is_number(ratio) and ratio < 1:
        draft.carry("training.warmup_steps", ratio, *draft.pop(".warmup_ratio", ".warmup_steps"))
    elif is_number(steps):
        draft.carry("training.warmup_steps", steps, *draft.pop(".warmup_steps"))
    for key in draft.pop(".warmup_ratio", ".warmup_steps"):
        draft.leave(key, DIFFERS, "training.warmup_steps holds one number: steps, or a share below 1")
    most, epochs = draft.look_number(".max_steps"), draft.values.get("training.num_train_epochs", 1)
    per_epoch = draft.look_number(".steps_per_epoch")
    keys = draft.pop(".max_steps", ".steps_per_epoch")
    if is_number(per_epoch, 1) and is_number(epochs):
        most = int(per_epoch * epochs)
    if is_number(most, 1):
        draft.carry("training.max_steps", most, *keys)
        if per_epoch:
            draft.note(
                "training.max_steps", f"each epoch ends after {per_epoch} steps there; the run after {most} here"
            )
    for key in keys if not is_number(most, 1) else []:
        draft.leave(key, UNNEEDED, "the epochs decide")
    rows, total = draft.values.get("training.per_device_train_batch_size", 1), draft.look(".batch_size")
    path = "training.gradient_accumulation_steps"
    for key in draft.pop(".batch_size"):
        if path in draft.values or not all(type(one) is int and one > 0 for one in (rows, total)) or total % rows:
            draft.leave(key, DIFFERS, f"rows of a step are per_device_train_batch_size x {path.rpartition('.')[2]}")
        else:
            draft.carry(path, total // rows, key)


def _settle_interval(draft: Draft, name: str, path: str) -> None:
    """How often the run is evaluated or saved: a number of steps, or each epoch."""
    strategy, per_epoch = draft.look(f".{name}_strategy"), draft.look(f".{name}s_per_epoch", 1)
    steps = draft.look_number(f".{name}_steps")
    keys = draft.pop(f".{name}_strategy", f".{name}_steps", f".{name}s_per_epoch")
    value, note = "epoch", ""
    if strategy in ("no", False) or per_epoch == 0:
        for key in keys if name == "eval" else []:
            draft.leave(key, DIFFERS, "with evaluation rows Forge evaluates each epoch and at the end")
        return draft.carry("checkpoint", None, *keys) if name == "save" else None
    if strategy in (None, "steps") and is_number(steps, 1):
        value = int(steps)
    elif strategy == "steps" and steps is None:
        value = draft.values.get("logging.logging_steps", 500) if name == "eval" else 500
        note = f"no number of steps is given; {draft.name} takes {show(value)}"
    elif steps is not None or strategy not in (None, "epoch") or per_epoch != 1:
        note = "Forge counts in steps or whole epochs; write the number of steps for another interval"
    return draft.carry(path, value, *keys, note=note) if keys else None


def _settle_trackers(draft: Draft) -> None:
    path, given = "logging.report_to", draft.look(".report_to")
    names = [str(one).lower() for one in given] if isinstance(given, list) else str(given).lower().split(",")
    known = [one for one in _TRACKERS if any(one in name for name in names)]
    for key in draft.pop(".report_to"):
        off = set(names) <= {"none", "no", "false"} or draft.tool == "torchtune"
        if known:
            draft.carry(path, known, key)
        elif off:
            draft.leave(key, UNNEEDED, "each step is in metrics.jsonl")
        else:
            draft.leave(key, UNSUPPORTED, f"Forge reports to {', '.join(_TRACKERS)}")
    for tracker in _TRACKERS:
        value = draft.look(f".{tracker}")
        for key in draft.pop(f".{tracker}"):
            if value is False:
                draft.leave(key, UNNEEDED, "it is off")
                continue
            draft.carry(path, list(dict.fromkeys([*draft.values.pop(path, []), tracker])), key)
            if isinstance(value, str) and tracker in _VARIABLES:
                draft.note(path, f"the name of the project is read from {_VARIABLES[tracker]} in the environment")
