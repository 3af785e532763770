"""The rows A, B, D and I of the catalogue of faults: how each is caused, and the exit code it has to end with.

``python tests/reliability/catalogue_rows.py`` runs those that need no torch and prints what Forge says, and with
``--torch`` those that do. ``test_catalogue_snapshot.py`` compares it with ``tests/golden/catalogue.txt``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from faults_of_text import TEXTS

from forge_cli.cli.app import run_app

TINY = Path(__file__).parents[2] / "forge_cli" / "assets" / "forge-tiny"
MODEL = "model: {name: forge-tiny}\n"
DATA = "data: {train: forge:quickstart/train, max_length: 128}\n"
LOCAL = "model: {name: ./model}\n" + DATA + "lora: {}\ntraining: {max_steps: 2}\nreport: null\ncheckpoint: null\n"
ADAPTED = MODEL.replace("}", ", adapter: ./adapter}") + DATA
HEADER_BYTES = 7880  # of the embedded model
VALIDATE = ("config", "validate", "run.yaml")
TRAIN = ("train", "run.yaml")
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
TOKEN = "hf_" + "abcdEFGH" * 4

# Rows that Forge cannot suffer, because what they are about does not exist in it, or that are tested elsewhere.
NOT_HERE = {
    "A22": "run files take nothing from the environment: ${NAME} is text like any other",
    "A24": "test_broken_configs.py",
    "B04": "packing is proved on two real rows before the first step: tests/integration/test_packing.py (D13 too)",
    "B05 load_best": "there is no such setting; an interval beyond the last step is B05",
    "B09": "adapters are averaged, never the quantised base; there is no FSDP",
    "B11": "use_cache is no setting and always off while training; checkpointing is never reentrant",
    "B12": "there is no setting for the global batch; it follows, and the plan shows the arithmetic",
    "D05": "a flipped bit has no hash to be compared with; one that makes NaN is D11",
    "D12": "test_catalogue_network.py",
    "D13": "tests/integration/test_packing.py",
    "I02": "test_catalogue_network.py",
    "I05": "Forge opens no archives",
    "I09": "a note, no error: test_redaction.py",
}


class Row(NamedTuple):
    """One row of the catalogue.

    Attributes:
        name: Its number, and which fault of several.
        code: Exit code.
        text: The run file.
        command: What follows ``forge``.
        cause: Does what else is needed in the current folder.
        needs_torch: It is found when model and tokenizer are loaded.
    """

    name: str
    code: int
    text: str | bytes = MODEL + DATA
    command: tuple[str, ...] = VALIDATE
    cause: Callable[[], object] = lambda: None
    needs_torch: bool = False


def copy_model(**changes: object) -> Path:
    """Copies the embedded model to ``model``; keyword arguments change its config.json."""
    shutil.copytree(TINY, "model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, **changes}))
    return Path("model")


def change_weights(change: Callable[[bytes], bytes]) -> None:
    """Changes the bytes of the copied model's weights."""
    file = copy_model() / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


def spoil_weight(value: float) -> None:
    """Puts a value into one weight of the copied model."""
    from safetensors.numpy import load_file, save_file

    tensors = dict(load_file(copy_model() / "model.safetensors"))
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"].copy()
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})


def cut(file: str) -> None:
    """Takes the last byte off a file."""
    Path(file).write_bytes(Path(file).read_bytes()[:-1])


def write_shards(*written: str) -> None:
    """Splits the copied model in two files by an index, and keeps those that are named."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    whole = copy_model() / "model.safetensors"
    for name in written:
        shutil.copy(whole, f"model/{names[int(name) - 1]}")
    whole.unlink()
    index = {"weight_map": {"model.norm.weight": names[0], "model.embed_tokens.weight": names[1]}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))


def write_pickle(file: str) -> None:
    """Writes a pickle that makes the file ``hacked`` when it is loaded."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("hacked"),)

    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(pickle.dumps(Evil()))


def leave_pickle() -> None:
    """Leaves a malicious pickle as the model's only weights."""
    (copy_model() / "model.safetensors").unlink()
    write_pickle("model/pytorch_model.bin")


def write_adapter(weights: dict[str, list[int]] | None = None, **config: object) -> None:
    """Writes an adapter of rank 4 with tensors of these shapes."""
    Path("adapter").mkdir()
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    Path("adapter/adapter_config.json").write_text(json.dumps({**base, **config}))
    if weights is not None:
        write_tensors("adapter/adapter_model.safetensors", weights)


def write_tensors(file: str, shapes: dict[str, list[int]]) -> None:
    """Writes a safetensors file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    Path(file).write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def add_token() -> None:
    """Gives the copied model's tokenizer a token that has no embedding."""
    file = copy_model() / "tokenizer.json"
    content = json.loads(file.read_text())
    extra = {**content["added_tokens"][0], "id": 512, "content": "<|more|>"}
    file.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], extra]}))


def write_template(text: str) -> None:
    """Replaces the copied model's chat template."""
    (copy_model() / "chat_template.jinja").write_text(text)


def _known(kind: str, number: int = 0) -> str | bytes:
    """Returns a text of ``faults_of_text.py``."""
    return [text for one, text, _, _ in TEXTS if one == kind][number]


def _with(line: str) -> str:
    return f"{MODEL}{DATA}{line}\n"


def list_text_rows() -> list[Row]:
    """Rows A: the text of the run file."""
    return [
        Row("A01 tab", 2, f"{MODEL}data:\n\ttrain: forge:quickstart/train\n"),
        Row("A02 key twice", 2, _with("seed: 1\nseed: 2")),
        Row("A02 key twice inside", 2, _with("training:\n  seed: 1\n  max_steps: 1\n  max_steps: 2")),
        Row("A03 unknown key", 2, _with("training: {learning_rat: 1e-4}")),
        Row("A04 wrong section", 2, _with("lora: {learning_rate: 1e-4}")),
        Row("A05 quoted number", 2, _with('training: {learning_rate: "2e-4"}')),
        Row("A06 word", 2, _with("training: {activation_checkpointing: yes}")),
        Row("A06 word as key", 2, _with("on: true")),
        Row("A07 octal", 2, _with("seed: 010")),
        Row("A07 sexagesimal", 2, _with("seed: 1:30")),
        Row("A07 date", 2, _with("seed: 2024-01-01")),
        Row("A07 underscore", 2, _with("seed: 1_000")),
        Row("A08 nan", 2, _with("training: {learning_rate: .nan}")),
        Row("A08 negative", 2, _with("training: {learning_rate: -1}")),
        Row("A08 zero", 2, _with("training: {max_steps: 0}")),
        Row("A09 list wanted", 2, _with("lora: {target_modules: q_proj}")),
        Row("A09 number wanted", 2, _with("training: {max_steps: many}")),
        Row("A09 null wanted", 2, _with('quantization: "None"')),
        Row("A10 alias bomb", 2, _known("alias bomb")),
        Row("A11 merge keys", 2, _known("merge keys")),
        Row("A12 recursive alias", 2, _known("alias bomb", 1)),
        Row("A13 depth", 2, _known("nested too deep")),
        Row("A14 size", 2, _known("too big")),
        Row("A15 not UTF-8", 2, _with("name: ").encode() + b"\xff\n"),
        Row("A15 NUL", 2, _with("name: a\0b")),
        Row("A15 UTF-16", 2, _known("bytes")),
        Row("A16 python tag", 2, _with("name: !!python/object/apply:os.system ['touch hacked']")),
        Row("A16 other tag", 2, _with("name: !foo x")),
        Row("A17 two documents", 2, f"{MODEL}{DATA}---\nseed: 1\n"),
        Row("A17 empty", 2, ""),
        Row("A17 comment", 2, "# later\n"),
        Row("A17 list", 2, "- a\n"),
        Row("A17 no blank", 2, "lr:1\n"),
        Row("A18 braces", 2, _with("name: {{ name }}")),
        Row("A18 at sign", 2, _with("name: @home")),
        Row("A18 colon", 2, _with("output_dir: C:\\x: y")),
        Row("A19 digits", 2, _with("seed: " + "9" * 5000)),
        Row("A20 missing", 2, command=("config", "validate", "rum.yaml")),
        Row("A20 folder", 2, command=("config", "validate", ".")),
        Row("A20 pipe", 2, command=("config", "validate", "pipe"), cause=lambda: os.mkfifo("pipe")),
        Row("A20 device", 2, command=("config", "validate", "/dev/zero")),
        Row("A21 value", 2, command=(*VALIDATE, "--set", "training.learning_rate=abc")),
        Row("A21 path", 2, command=(*VALIDATE, "--set", "training.lerning_rate=1")),
        Row("A21 no equals", 2, command=(*VALIDATE, "--set", "seed")),
        Row("A21 option", 2, command=(*VALIDATE, "--sett", "seed=1")),
        Row("A23 newer", 2, _with("version: 99")),
    ]


def list_contradiction_rows() -> list[Row]:
    """Rows B: settings that are fine alone."""
    eval_rows = DATA.replace("}", ", eval_rows: 5}")
    return [
        Row("B01 format", 5, _with("training: {precision: fp16, max_steps: 2}\nlora: {}"), TRAIN, needs_torch=True),
        Row("B02 quantised", 2, _with("quantization: {bits: 4}\nlora: null")),
        Row(
            "B03 fp16 twice", 2, "model: {name: forge-tiny, dtype: float16}\n" + DATA + "training: {precision: fp16}\n"
        ),
        Row("B05 save", 2, _with("training: {max_steps: 10}\ncheckpoint: {save_steps: 20}")),
        Row("B05 evaluate", 2, MODEL + eval_rows + "training: {max_steps: 10}\nevaluation: {eval_steps: 20}\n"),
        Row("B06 no rows", 2, _with("evaluation: {eval_steps: 5}")),
        Row("B08 no module", 2, _with("lora: {target_modules: [q_prj]}")),
        Row("B08 head", 2, _with("lora: {target_modules: [lm_head]}")),
        Row("B08 nothing", 2, _with("lora: {target_modules: []}")),
        Row("B10 warm-up", 2, _with("training: {max_steps: 10, warmup_steps: 10}")),
        Row("B10 average", 2, _with("training: {max_steps: 10}\nema: {update_after_step: 10}")),
        Row("B13 both", 2, command=("train", "run.yaml", "--resume", "--overwrite")),
        Row("B14 length", 2, MODEL + DATA.replace("128", "1024")),
        # The rows have to be read for it, so it is a fault of the data.
        Row("B07 method", 3, "method: dpo\n" + MODEL + DATA, ("data", "check", "run.yaml")),
    ]


def list_model_rows() -> list[Row]:
    """Rows D: the files of the model, by headers and index as far as that goes."""
    misfit = {
        "width": {f"{QUERY}.lora_A.weight": [4, 96], f"{QUERY}.lora_B.weight": [128, 4]},
        "rank": {f"{QUERY}.lora_A.weight": [8, 128], f"{QUERY}.lora_B.weight": [128, 8]},
    }
    return [
        Row("D01 missing", 4, LOCAL, cause=lambda: (copy_model() / "config.json").unlink()),
        Row("D01 not JSON", 4, LOCAL, cause=lambda: (copy_model() / "config.json").write_text('{"a": ')),
        Row("D01 depth", 4, LOCAL, cause=lambda: (copy_model() / "config.json").write_text("[" * 100_000)),
        Row("D01 no kind", 4, LOCAL, cause=lambda: copy_model(model_type=None)),
        Row("D01 kind", 4, LOCAL, TRAIN, lambda: copy_model(model_type="lama"), needs_torch=True),
        Row("D02 one shard", 4, LOCAL, cause=lambda: write_shards("1")),
        Row("D02 no shard", 4, LOCAL, cause=write_shards),
        Row("D02 index", 4, LOCAL, cause=lambda: _write_index('{"weight_map": {"a": "../../etc/passwd"}}')),
        Row("D03 empty", 4, LOCAL, cause=lambda: change_weights(lambda one: b"")),
        Row("D03 header only", 4, LOCAL, cause=lambda: change_weights(lambda one: one[:HEADER_BYTES])),
        Row("D03 half", 4, LOCAL, cause=lambda: change_weights(lambda one: one[: len(one) // 2])),
        Row("D03 short", 4, LOCAL, cause=lambda: change_weights(lambda one: one[:-1])),
        Row("D03 long", 4, LOCAL, cause=lambda: change_weights(lambda one: one + b"\0")),
        Row(
            "D04 pointer",
            4,
            LOCAL,
            cause=lambda: change_weights(lambda one: b"version https://git-lfs.github.com/spec\n"),
        ),
        Row("D04 page", 4, LOCAL, cause=lambda: change_weights(lambda one: b"<!DOCTYPE html><html></html>")),
        Row("D06 pickle", 4, LOCAL, cause=leave_pickle),
        Row("D07 pickle", 4, LOCAL, TRAIN, leave_pickle),
        Row("D07 adapter", 4, ADAPTED, TRAIN, lambda: (write_adapter(), write_pickle("adapter/adapter_model.bin"))),
        Row("D08 config", 4, LOCAL, cause=lambda: copy_model(vocab_size=600)),
        Row("D08 tokenizer", 4, LOCAL, TRAIN, add_token, needs_torch=True),
        Row("D09 base", 2, ADAPTED, cause=lambda: write_adapter({}, base_model_name_or_path="org/other")),
        Row("D09 width", 4, ADAPTED, cause=lambda: write_adapter(misfit["width"])),
        Row("D09 rank", 4, ADAPTED, cause=lambda: write_adapter(misfit["rank"])),
        Row("D09 damaged", 4, ADAPTED, cause=lambda: (write_adapter({}), cut("adapter/adapter_model.safetensors"))),
        Row("D10 auto_map", 4, LOCAL, cause=lambda: copy_model(auto_map={"AutoModel": "evil.Evil"})),
        Row("D10 remote code", 4, LOCAL, cause=lambda: copy_model(trust_remote_code=True)),
        Row("D10 internal", 4, LOCAL, cause=lambda: copy_model(_attn_implementation_internal="org/kernel")),
        Row("D10 kernel", 4, LOCAL, cause=lambda: copy_model(text_config={"attn_implementation": "org/kernel"})),
        Row("D11 nan", 4, LOCAL, TRAIN, lambda: spoil_weight(float("nan")), needs_torch=True),
        Row("D11 infinite", 4, LOCAL, TRAIN, lambda: spoil_weight(float("-inf")), needs_torch=True),
    ]


def _write_index(text: str) -> None:
    (copy_model() / "model.safetensors").unlink()
    Path("model/model.safetensors.index.json").write_text(text)


def list_security_rows() -> list[Row]:
    """Rows I: secrets, paths, programs of strangers, terminals."""
    loop = "{% for i in range(10**9) %}x{% endfor %}"
    nested = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    escape = "{{ messages.__class__.__mro__ }}"
    return [
        Row("I01 hub token", 2, _with(f"name: {TOKEN}")),
        Row("I01 key", 2, _with("report: {prompts: [sk-proj-" + "a1B2" * 8 + "]}")),
        Row("I01 AWS", 2, _with("output_dir: runs/AKIAIOSFODNN7EXAMPLE")),
        Row("I01 URL", 2, MODEL + DATA.replace("forge:quickstart/train", "https://me:pa55word@host/rows.jsonl")),
        Row("I01 override", 2, command=(*VALIDATE, "--set", f"name={TOKEN}")),
        Row("I01 argument", 2, command=("config", "validate", f"{TOKEN}.yaml")),
        Row("I03 parent", 2, _with("extends: ../../etc/passwd")),
        Row("I03 absolute", 2, _with("preset: /etc/passwd")),
        Row("I03 home", 2, command=("recipes", "show", "~/.netrc")),
        Row("I03 NUL", 2, command=("recipes", "show", "a\0b")),
        Row("I04 slash", 2, _with("name: a/b")),
        Row("I04 parent", 2, _with("name: ..")),
        Row("I04 newline", 2, _with('name: "a\\nb"')),
        Row("I04 long", 2, _with(f"name: {'a' * 300}")),
        Row("I06 range", 4, LOCAL, TRAIN, lambda: write_template(loop), needs_torch=True),
        Row("I06 time", 4, LOCAL, TRAIN, lambda: write_template(nested), needs_torch=True),
        Row("I06 escape", 4, LOCAL, TRAIN, lambda: write_template(escape), needs_torch=True),
        Row("I06 size", 4, LOCAL, TRAIN, lambda: write_template("x" * 70_000), needs_torch=True),
        Row("I07 remote code", 2, "model: {name: forge-tiny, trust_remote_code: true}\n" + DATA),
        Row("I08 name", 2, 'model: {name: "./\\e[31mred"}\n' + DATA),
        Row("I08 argument", 2, command=("config", "validate", "\x1b[2Jgone.yaml")),
    ]


def list_rows() -> list[Row]:
    """Lists all rows, in the order of the catalogue as far as processes allow."""
    return [*list_text_rows(), *list_model_rows(), *list_security_rows(), *list_contradiction_rows()]


def run_row(row: Row) -> dict[str, object]:
    """Causes a fault in a folder of its own and runs the command in this process."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            Path("run.yaml").write_bytes(row.text if isinstance(row.text, bytes) else row.text.encode())
            row.cause()
            before = {str(one) for one in Path().rglob("*")}
            said, code = io.StringIO(), None
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    run_app(list(row.command))
                except SystemExit as end:
                    code = end.code
            new = sorted({str(one) for one in Path().rglob("*")} - before - {"runs"})
        finally:
            os.chdir(home)
        text = said.getvalue().replace(os.path.realpath(place), "FOLDER").replace(place, "FOLDER")
    torch = any(one in sys.modules for one in ("torch", "transformers", "datasets")) and "B07" not in row.name
    return {"name": row.name, "code": code, "said": text, "torch": torch, "new": new}


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    wanted = [one for one in list_rows() if one.needs_torch == ("--torch" in sys.argv)]
    if "--torch" in sys.argv:
        import forge_cli.build.tokenizer

        forge_cli.build.tokenizer.TEMPLATE_SECONDS = 1.0
        # What never ends goes on in a thread, so it comes last.
        wanted.sort(key=lambda one: one.name == "I06 time")
    found = [run_row(one) for one in wanted]
    sys.__stdout__.write(json.dumps(found))
    sys.__stdout__.flush()
    os._exit(0)
