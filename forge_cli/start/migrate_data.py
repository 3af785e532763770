"""Where each tool says its rows are, and what Forge makes of it."""

from __future__ import annotations

import json
from pathlib import Path

from forge_cli.errors import ConfigError
from forge_cli.resolve.sources import is_data_file
from forge_cli.resolve.wording import show
from forge_cli.start.migrate_draft import DIFFERS, UNNEEDED, UNSUPPORTED, Draft
from forge_cli.start.migrate_rows import MOST_BYTES, DataSet, add_sources, count_rows, list_data_sets, name_hub

_OWN_TEXT = "{} writes its own text around a row ('Below is an instruction ...'); here the model's chat template does"


def read_rows(draft: Draft) -> None:
    """Gives a draft its training and evaluation rows.

    Raises:
        ConfigError: No training rows are named, or of a kind that Forge does not know.
    """
    readers = {"axolotl": _read_axolotl, "llama-factory": _read_llama_factory, "trl": _read_trl}
    readers.get(draft.tool, _read_torchtune)(draft)
    value = draft.look_number(".val_size")
    for key in draft.pop(".val_size"):
        if "data.eval" in draft.values or not isinstance(value, (int, float)) or not 0 < value < 1e12:
            draft.leave(key, UNNEEDED, "it is 0" if value == 0 else "the evaluation rows have a place of their own")
        elif value < 1:
            draft.carry("data.eval_fraction", value, key)
        else:
            draft.carry("data.eval_rows", int(value), key)
    if "data.train" not in draft.values:
        raise ConfigError("no training rows are named", where=draft.source.document.file, fix="name a data set there")
    for key in draft.source.leaves:
        if key[0] in draft.table["data"] and key not in draft.lines:
            empty = draft.source.leaves[key] in (None, "", [], {}, False)
            draft.leave(key, *((UNNEEDED, "it is empty") if empty else (UNSUPPORTED, "it names no rows that are read")))


def _read_axolotl(draft: Draft) -> None:
    streamed = draft.source.data.get("pretraining_dataset")
    if isinstance(streamed, str) and streamed:
        add_sources(draft, "data.train", [{"path": streamed}], [("pretraining_dataset",)], "text")
    for name, target in (("datasets", "train"), ("pretraining_dataset", "train"), ("test_datasets", "eval")):
        for one in list_data_sets(draft, name):
            _read_axolotl_set(draft, one, f"data.{target}", "pretrain" if name == "pretraining_dataset" else None)
    if streamed:
        draft.values |= {"data.streaming": "training.max_steps" in draft.values, "data.on_overlong": "split"}
        draft.note("data.streaming", "Axolotl streams these rows; what is longer goes on in the next row")


def _read_axolotl_set(draft: Draft, one: DataSet, target: str, usual: str | None) -> None:
    kind = one.take("type", usual)
    form, columns = _read_type(draft, one, kind) if isinstance(kind, dict) else _find_type(draft, one, kind)
    fields = {**draft.table["fields"], "field_messages": "prompt" if form == "preference" else form}
    for theirs, ours in fields.items():
        column = one.take(theirs)
        if theirs == "field_messages" and column == "conversations" and form == "messages":
            form = "conversations"
        elif column is not None and column != ours and ours is not None:
            columns[ours] = str(column)
    roles = one.take("roles_to_train")
    if isinstance(roles, list):
        trains_all = {"user", "human"} & set(map(str, roles))
        one.carry("data.train_on", "all" if trains_all else "assistant", "roles_to_train")
    subset, revision = one.take("name"), one.take("revision")
    paths = [name_hub(path, subset, revision) for path in one.take_paths("path", "data_files")]
    one.add(target, paths, one.take_split("split") | ({"columns": columns} if columns else {}), form)


def _find_type(draft: Draft, one: DataSet, kind: object) -> tuple[str | None, dict]:
    """Tells what rows of a named type look like: their format, and the columns that have other names."""
    types, name, method = draft.table["types"], str(kind or ""), draft.values.get("method", "sft")
    known = next((types[part] for part in (name, name.partition(":")[0], name.partition(".")[0]) if part in types), {})
    if method == "kto":
        return "unpaired_preference", {}
    if method != "sft" and known.get("format") != "preference":
        return "preference", {}
    if not known:
        one.leave("type", DIFFERS, f"{show(name)} is not known here; the columns tell the format")
        return None, {}
    if known.get("text"):
        draft.note("data.format", _OWN_TEXT.format(name))
    return known["format"], dict(known.get("columns", {}))


def _read_type(draft: Draft, one: DataSet, kind: dict) -> tuple[str, dict]:
    """Tells what rows of a type that is written out look like; its text around them is not carried."""
    names = draft.table["type_fields"]
    columns = {names[theirs]: str(kind[theirs]) for theirs in names if kind.get(theirs)}
    if "completion" in columns and {"input", "system"} & set(columns):
        columns = {{"prompt": "instruction", "completion": "output"}.get(ours, ours): columns[ours] for ours in columns}
    for key in [key for key in one.used if "type" in key and key[-1] not in names]:
        one.used.remove(key)
        draft.leave(key, UNSUPPORTED, "the text around a row is the chat template's")
    fits = {"chosen": "preference", "label": "unpaired_preference", "instruction": "instruction"}
    form = next((fits[ours] for ours in fits if ours in columns), "prompt_completion")
    return form, {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def _read_llama_factory(draft: Draft) -> None:
    data = draft.source.data
    folder, most = str(data.get("dataset_dir") or "data"), data.get("max_samples")
    most = most if type(most) is int and most > 0 else None
    info = _read_info(draft, folder)
    for name, target in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        value = data.get(name)
        named = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else []
        for one in (str(part).strip() for part in named if str(part).strip()):
            source, form = _find_in_info(draft, one, folder, info, target)
            if most and most < count_rows(source["path"], most + 1):
                source["rows"] = most
            add_sources(draft, target, [source], [(name,)] if (name,) not in draft.lines else [], form)
    for key in draft.source.leaves:
        if key == ("max_samples",) and most and "data.train" in draft.values:
            draft.carry("data.train", draft.values["data.train"], key)
            draft.note("data.train", f"at most {most} rows are taken there; rows: {most} draws as many by the seed")
        elif key in (("dataset_dir",), ("media_dir",)):
            draft.leave(key, UNNEEDED, "files are named by their paths")


def _read_info(draft: Draft, folder: str) -> dict:
    """Reads dataset_info.json, in the working folder or beside the file; the place of its files is under ``""``."""
    for place in (Path(folder), Path(draft.source.document.file).parent / folder):
        file = place / "dataset_info.json"
        try:
            if file.is_file() and file.stat().st_size <= MOST_BYTES:
                info = json.loads(file.read_text(encoding="utf-8"))
                return {**info, "": str(place)} if isinstance(info, dict) else {}
        except (OSError, ValueError, RecursionError) as error:
            what = f"cannot be read: {type(error).__name__}"
            raise ConfigError(what, where=str(file), fix="it should be JSON") from None
    return {}


def _find_in_info(draft: Draft, name: str, folder: str, info: dict, target: str) -> tuple[dict, str | None]:
    """Finds a data set of dataset_info.json: its source, and its format where that is told."""
    entry, file = info.get(name), f"{folder}/dataset_info.json"
    if not isinstance(entry, dict):
        hub = draft.table["hub"].get(name)
        path = hub or (name if is_data_file(name) or "/" in name else f"{folder}/{name}.json")
        if hub:
            draft.note(target, f"{name} is {hub} on the hub, as {file} is not here")
        elif path != name:
            draft.note(target, f"{file} does not tell what {name} is; write the name of its file here")
        return {"path": path}, None
    columns, tags = ({} if not isinstance(entry.get(one), dict) else entry[one] for one in ("columns", "tags"))
    talk = entry.get("formatting") == "sharegpt"
    if entry.get("ranking") is True:
        form = "preference"
    elif "kto_tag" in columns:
        form = "unpaired_preference"
    elif talk:
        form = "messages" if "messages" in (tags.get("role_tag"), columns.get("messages")) else "conversations"
    else:
        form = "text" if columns.get("prompt") == "text" and "response" not in columns else "instruction"
    usual = draft.table.get("usual", {}).get(form, {})
    names = draft.table["shapes"][form]
    named = (usual | {"prompt": "conversations"} if talk and usual else usual) | {
        names[ours]: str(theirs) for ours, theirs in columns.items() if ours in names
    }
    renamed = {ours: theirs for ours, theirs in named.items() if ours != theirs}
    own = f"{info['']}/{entry.get('file_name')}" if entry.get("file_name") else None
    source = {"path": own or name_hub(str(entry.get("hf_hub_url") or name), entry.get("subset"))}
    source |= {"split": str(entry["split"])} if entry.get("split") not in (None, "train") else {}
    return source | ({"columns": renamed} if renamed else {}), form


def _read_trl(draft: Draft) -> None:
    data, whole = draft.source.data, DataSet(draft, (), draft.source.data)
    whole.left = [key for key in whole.left if key[0] in draft.table["data"] and key[0] != "datasets"]
    field, evaluates = whole.take("dataset_text_field", "text"), data.get("eval_strategy") not in (None, "no", False)
    columns = {"columns": {"text": str(field)}} if field != "text" else {}
    name, subset = whole.take("dataset_name"), whole.take("dataset_config")
    if name:
        test = whole.take("dataset_test_split", "test") if evaluates else None
        keys = [key for key in whole.used if key == ("dataset_test_split",)]
        whole.used = [key for key in whole.used if key not in keys]
        path = name_hub(str(name), subset)
        source = whole.take_split("dataset_train_split") | columns
        add_sources(draft, "data.train", [{"path": path, **source}], whole.used, "text" if columns else None)
        if test:
            add_sources(draft, "data.eval", [{"path": path, "split": str(test), **columns}], keys, None)
    for one in list_data_sets(draft, "datasets"):
        paths, part = one.take_paths("path", "data_files"), one.take("name")
        one.leave("columns", DIFFERS, "columns that are not read are left out anyway")
        one.leave("data_dir", UNSUPPORTED, "name the files in the path")
        one.add("data.train", [name_hub(path, part) for path in paths], one.take_split("split"), None)
    whole.leave("dataset_test_split", UNNEEDED, "Forge evaluates when eval_strategy asks for it")
    for key in whole.left:
        if key == ("test_split_size",) and data[key[0]]:
            draft.facts[".val_size"] = (data[key[0]], key)
        elif "streaming" in key[0] and data[key[0]] is True and "training.max_steps" in draft.values:
            draft.carry("data.streaming", True, key)
        elif "streaming" in key[0] and data[key[0]] is True:
            draft.leave(key, DIFFERS, "streamed rows need max_steps; all rows are read before training here")


def _read_torchtune(draft: Draft) -> None:
    for name, target in (("dataset", "data.train"), ("dataset_val", "data.eval")):
        for one in list_data_sets(draft, name):
            _read_torchtune_set(draft, one, target)


def _read_torchtune_set(draft: Draft, one: DataSet, target: str) -> None:
    builder = str(one.take("_component_", "")).rpartition(".")[2]
    known = draft.table["types"].get(builder)
    if known is None:
        fix = f"name a builder such as {', '.join(list(draft.table['types'])[:3])}, or write the run file by hand"
        where = draft.source.where(one.place)
        raise ConfigError(f"Forge does not know the data of {show(builder)}", where=where, fix=fix)
    columns, form, given = dict(known.get("columns", {})), known["format"], one.take("column_map")
    if isinstance(given, dict):
        columns = {ours: given.get(theirs, theirs) for ours, theirs in columns.items()} or given
    if (column := one.take("conversation_column")) is not None:
        form = "conversations" if column == "conversations" else "messages"
        columns = {form: column}
    if (column := one.take("column")) is not None:
        columns = {"text": column}
    columns = {str(ours): str(theirs) for ours, theirs in columns.items() if ours != theirs}
    prompts = one.take("train_on_input", known.get("prompts", False))
    if target == "data.train":
        one.carry("data.train_on", "all" if prompts is True else "assistant", "train_on_input")
        if known.get("prompts") and prompts is True:
            draft.note("data.train_on", f"{builder} trains the prompts as well, unless train_on_input is false")
        for name, path in (("packed", "data.packing"), ("max_seq_len", "data.max_length")):
            if (value := one.take(name)) is not None:
                one.carry(path, value, name)
    for name in ("train_on_input", "packed", "max_seq_len") if target == "data.eval" else ():
        one.leave(name, DIFFERS, "evaluation rows are treated like the training rows")
    subset = one.take("name") or one.take("subset") or known.get("subset")
    paths = [name_hub(path, subset) for path in one.take_paths("source", "data_files", known.get("path"))]
    one.add(target, paths, one.take_split("split") | ({"columns": columns} if columns else {}), form)
