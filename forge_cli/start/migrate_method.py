"""Which training method, and which loss, a file of another tool is for."""

from __future__ import annotations

from forge_cli.errors import ConfigError
from forge_cli.resolve.wording import show
from forge_cli.start.migrate_draft import UNNEEDED, UNSUPPORTED, Draft


def settle_method(draft: Draft, method: str | None) -> None:
    """Finds the method and its loss.

    Args:
        draft: The draft.
        method: The command of TRL that the user named.

    Raises:
        ConfigError: Forge has no such method, or TRL's command cannot be told.
    """
    methods, stages = draft.table["methods"], draft.table.get("stages", {})
    stage, named = draft.look(".stage"), draft.look(".method")
    named = named.rpartition(".")[2] if isinstance(named, str) else named
    for name, value, known in ((".stage", stage, stages), (".method", named, methods)):
        if value is not None and (not isinstance(value, str) or value not in known):
            where, fix = draft.source.where(draft.facts[name][1]), f"what can be carried: {', '.join(known)}"
            raise ConfigError(f"Forge has no method {show(value)}", where=where, fix=fix)
    if draft.tool == "trl":
        target = _find_trl_method(draft, method)
    elif stage is not None and (stages[stage] != "dpo" or named is None):
        target = stages[stage]
    else:
        target = methods.get(named, "sft")
    target = "reward" if draft.look(".reward_model") is True else target
    ours, _, loss = target.partition("/")
    keys = draft.pop(".stage", ".method", ".reward_model")
    if keys or ours != "sft":
        draft.carry("method", ours, *keys)
    if loss:
        draft.carry("preference.loss_type", loss, *keys)
    if loss == "simpo" and draft.tool != "axolotl" and draft.tool != "trl":
        draft.values["preference.cpo_alpha"] = 0.0  # no plain loss beside it
    if draft.tool == "torchtune":
        _settle_margins(draft, loss)
    if stage == "pt":
        _settle_text(draft)


def _settle_margins(draft: Draft, loss: str) -> None:
    """torchtune's SimPO has a beta of its own, and its hinge loss calls beta gamma."""
    if loss == "simpo":
        draft.values.setdefault("preference.beta", 2.0)
    if loss == "hinge" and "preference.simpo_gamma" in draft.values:
        value, keys = draft.values.pop("preference.simpo_gamma"), draft.keys.pop("preference.simpo_gamma")
        for key in keys:
            draft.lines.pop(key)
        draft.carry("preference.beta", value, *keys)


def _find_trl_method(draft: Draft, method: str | None) -> str:
    """Tells for which of TRL's commands a file is, and places its loss."""
    marks, loss = draft.table["method_marks"], draft.look(".loss_type")
    names = {key[0] for key in draft.source.leaves}
    seen = [f"loss_type {show(loss)}"] if loss is not None else []
    if method is not None:
        target, seen = draft.table["methods"][method], ["--method"]
    elif loss in ("orpo", "simpo"):
        target = draft.table["methods"][loss]
    elif found := next((one for one in marks if set(marks[one]) & names), None):
        target, seen = found, sorted(set(marks[found]) & names)
    elif draft.source.data.get("lora_task_type") == "SEQ_CLS":
        target, seen = "reward", ["lora_task_type"]
    else:
        target = "sft" if loss is None or loss in draft.table["sft_losses"] else "dpo"
    if target == "sft" and "beta" in names and method is None:
        what = "beta is for dpo, kto, orpo and cpo, and no other key tells which command of TRL this is for"
        fix = "name the command: --method dpo|kto|orpo|cpo"
        raise ConfigError(what, where=draft.source.where(("beta",)), fix=fix)
    told = f"{target.partition('/')[0]} is told by {', '.join(seen) or 'default'}"
    draft.note("method", f"TRL's command is not in its file; {told}; --method says another")
    for key in draft.pop(".loss_type"):
        if target == "sft":
            kind = UNNEEDED if loss == "nll" else UNSUPPORTED
            draft.leave(key, kind, "the loss of sft is the plain one")
        else:
            draft.carry("preference.loss_type", loss, key)
    draft.table["defaults"]["training.learning_rate"][0] = draft.table["method_rates"][target.partition("/")[0]]
    return target


def _settle_text(draft: Draft) -> None:
    """Rows of plain text are read on in the next row, not cut off."""
    draft.values["data.format"] = "text"
    draft.values.setdefault("data.on_overlong", "split")
    if not draft.values.get("data.streaming"):
        draft.values.setdefault("data.packing", True)
        draft.note("data.packing", f"{draft.name} packs plain text; what is longer goes on in the next row")
