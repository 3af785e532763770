"""What the fuzzing campaign asks Forge: run files, files of rows and arguments, by hypothesis.

Every case is a command line and the files beside it; bytes are written as latin-1 text, so that a case is JSON.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from forge_cli.cli.app import COMMANDS, app
from forge_cli.resolve.schema_tree import list_leaf_paths

sys.path.insert(0, str(Path(__file__).parents[1] / "reliability"))
from valid_configs import draw_settings, write_run_file

Case = dict[str, object]
# These train, or load torch.
LEFT_OUT = {"resume", "chaos", "--trace", "--calibrate"}
WRITING = ("--html", "--plot", "copy")
RUN_FILE = "method: {method}\nmodel: {{name: forge-tiny}}\ndata: {{train: {file}, max_length: {length}{more}}}\n"

controls = st.sampled_from(
    [*map(chr, range(32)), "\x7f", "\x85", "\xa0", "\u2028", "\u202e", "\ufeff", "\ufffe", "\U0010ff01"]
)
characters = st.one_of(controls, st.characters(codec="utf-8"))
words = st.one_of(
    st.sampled_from(
        ["", "~", "null", "yes", "-0", "1e999", ".nan", "0x1F", "0o7", "1_000", "010", "1:30", "<<", "=", "---"]
    ),
    st.integers().map(str),
    st.integers(20, 5000).map(lambda count: "9" * count),
    st.floats().map(repr),
    st.text(characters, max_size=30),
    st.sampled_from(list_leaf_paths()).map(lambda path: path.rpartition(".")[2]),
    st.tuples(st.sampled_from("ax \t'\"[{\u00e9\U0001f600"), st.integers(1, 120_000)).map(lambda one: one[0] * one[1]),
)
# fmt: off
_TOKENS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\x1b[31m", b"\r", b"\n",
    b"\t", b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system ", b"!<x> ", b"%YAML 9.9\n", b"---\n",
    b"...\n", b"? ", b"- " * 60, b"[" * 500, b"{" * 500, b"{a: " * 300, b"|9\n", b">-\n", b"'", b'"', b'"\\ud800"',
    b'"\\x"', b"1" * 5000, b"1e400", b"null", b"NaN", b"{}", b"[]", b",", b"]", b"}", b'{"a":1,"a":2}',
    b"<|im_end|>", b"</s>",
]
# fmt: on
tokens = st.one_of(st.sampled_from(_TOKENS), st.binary(max_size=8))


def mutate(base: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    """Inserts, overwrites, removes and repeats pieces of a text."""
    for kind, first, second, token in changes:
        start, end = sorted((int(first * len(base)), int(second * len(base))))
        piece = base[start:end]
        new = {"insert": token + piece, "replace": token, "cut": b"", "repeat": piece * 3}[kind]
        base = (base[:start] + new + base[end:])[:400_000]
    return base


fractions = st.floats(0, 1)
changes = st.lists(
    st.tuples(st.sampled_from(["insert", "replace", "cut", "repeat"]), fractions, fractions, tokens), max_size=6
)


def _mutations(base: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(mutate, base, changes)


def _write_valid(number: int) -> bytes:
    dice = random.Random(number)
    return write_run_file(draw_settings(dice), dice).text.encode()


def _indent(text: str) -> str:
    return "".join(f"\n  {line}" for line in text.split("\n"))


prefixes = st.sampled_from(["", "", "", "&a ", "&b ", "!!str ", "!!int ", "!x ", "? ", "|\n ", ">\n ", "# "])
nodes = st.recursive(
    st.one_of(words, st.sampled_from(["*a", "*b", "''", '""']), words.map(json.dumps)),
    lambda inner: st.one_of(
        st.lists(st.tuples(prefixes, inner), max_size=5).map(
            lambda all: "".join(f"\n- {p}{_indent(one)}" for p, one in all)
        ),
        st.lists(st.tuples(words, prefixes, inner), max_size=5).map(
            lambda all: "".join(f"\n{key}: {p}{_indent(one)}" for key, p, one in all)
        ),
        st.lists(st.tuples(prefixes, inner), max_size=4).map(
            lambda all: "[" + ", ".join(p + one for p, one in all) + "]"
        ),
        st.lists(st.tuples(words, inner), max_size=4).map(
            lambda all: "{" + ", ".join(f"{k}: {v}" for k, v in all) + "}"
        ),
    ),
    max_leaves=20,
)
sections = st.tuples(st.sampled_from(list_leaf_paths()), prefixes, nodes).map(
    lambda one: (one[0].replace(".", ": {") + f": {one[1]}{one[2]}" + "}" * one[0].count(".") + "\n").encode()
)
yaml_bytes = st.one_of(
    _mutations(st.integers(0, 10**6).map(_write_valid)),
    _mutations(st.lists(sections, max_size=4).map(lambda all: b"model: {name: forge-tiny}\n" + b"".join(all))),
    nodes.map(lambda text: text.encode()[:1_100_000]),
    st.binary(max_size=300),
    st.integers(1, 40).map(
        lambda n: b"a: &a0 [x]\n" + b"".join(b"b%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, n))
    ),
)
yaml_commands = st.sampled_from(
    [["config", "validate"]] * 3
    + [["config", "show"], ["config", "validate", "--json"], ["train", "--dry-run"], ["estimate"]]
)
yaml_cases = st.builds(
    lambda command, text: {"args": [*command, "run.yaml"], "files": {"run.yaml": text.decode("latin-1")}},
    yaml_commands,
    yaml_bytes,
)

json_text = st.text(st.one_of(controls, st.characters(), st.sampled_from("\ud800\udfff")), max_size=40)
texts = st.one_of(json_text, st.sampled_from(["<|im_end|>", "<think>a</think>b", "", " ", "{{ x }}", "\0"]), words)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(
    scalars,
    lambda one: st.one_of(
        st.lists(one, max_size=4), st.dictionaries(st.sampled_from(["text", "role", "type", "name"]), one)
    ),
    max_leaves=8,
)
roles = st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human"]), values)
contents = st.one_of(texts, texts, values)
turn = st.one_of(
    st.fixed_dictionaries(
        {"role": roles, "content": contents},
        optional={"tool_calls": values, "name": values, "weight": values, "reasoning_content": contents},
    ),
    st.fixed_dictionaries({"from": roles, "value": contents}),
    values,
)


def _chat(answers: list[object]) -> list[object]:
    return [{"role": ("user", "assistant")[number % 2], "content": one} for number, one in enumerate(answers)]


turns = st.one_of(st.lists(texts, min_size=2, max_size=4).map(_chat), st.lists(turn, max_size=5), values)
sides = st.one_of(texts, turns)
ids = st.one_of(st.lists(st.integers(-200, 600), max_size=8), values)
extras = {"tools": values, "chat_template_kwargs": values, "system": contents, "other": values}
rows = st.one_of(
    st.fixed_dictionaries({"messages": turns}, optional=extras),
    st.fixed_dictionaries({"conversations": turns}, optional=extras),
    st.fixed_dictionaries({"prompt": sides, "completion": sides}, optional={**extras, "label": values}),
    st.fixed_dictionaries({"instruction": contents, "output": contents}, optional={"input": contents, **extras}),
    st.fixed_dictionaries({"text": contents}),
    st.fixed_dictionaries({"input_ids": ids}, optional={"labels": ids, "attention_mask": ids}),
    st.fixed_dictionaries({"chosen": sides, "rejected": sides}, optional={"prompt": sides, **extras}),
    st.dictionaries(texts, values, max_size=4),
    values,
)
# Mostly of one shape, as a mixed file is refused before its rows are looked at.
alike = rows.flatmap(
    lambda one: st.lists(st.one_of(st.just(one), rows) if type(one) is dict else rows, min_size=1, max_size=4)
)


def _write_rows(kind: str, all_rows: list[object]) -> bytes:
    """Writes rows in a format; one that a format of columns cannot hold is left out."""
    lines = [json.dumps(one) for one in all_rows]
    if kind.startswith("jsonl"):
        plain = "\n".join(lines).encode()
        if kind.endswith(".gz"):
            import gzip

            return gzip.compress(plain)
        if kind.endswith(".zst"):
            import pyarrow as pa

            return pa.compress(plain, "zstd", asbytes=True)
        return plain
    if kind == "json":
        return f"[{','.join(lines)}]".encode()
    dicts = [one for one in all_rows if type(one) is dict] or [{"text": "a"}]
    if kind in ("csv", "tsv", "txt"):
        mark = "\t" if kind == "tsv" else ","
        cells = [list(dicts[0]), *[[one.get(key) for key in dicts[0]] for one in dicts]]
        return "\n".join(mark.join(json.dumps(str(one)) for one in line) for line in cells).encode()
    return _write_columns(kind, dicts)


def _write_columns(kind: str, dicts: list[dict]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = pa.Table.from_pylist(dicts)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        table = pa.table({"text": ["a", "b"]})
    sink = pa.BufferOutputStream()
    try:
        if kind == "parquet":
            parquet.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    except (pa.ArrowException, ValueError):
        return b"PAR1"
    return sink.getvalue().to_pybytes()


KINDS = ["jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "txt", "jsonl.gz", "jsonl.zst", "parquet", "arrow"]


@st.composite
def data_cases(draw) -> Case:
    """Rows in a file that `forge data check` reads, and a run file that names it."""
    kind = draw(st.sampled_from(KINDS))
    written = st.one_of(alike.map(lambda all_rows: _write_rows(kind, all_rows)), st.binary(max_size=300))
    content = draw(st.one_of(written, _mutations(written)))
    run_file = RUN_FILE.format(
        file=f"rows.{kind}",
        method=draw(st.sampled_from(["sft", "sft", "sft", "dpo", "kto", "reward"])),
        length=draw(st.sampled_from([16, 256, 4096, 10_000_000])),
        more=draw(st.sampled_from(["", ", on_bad_row: skip, max_bad_ratio: 1"]))
        + draw(st.sampled_from(["", *(f", on_overlong: {one}, max_lost_ratio: 1" for one in ("drop", "truncate"))]))
        + draw(st.sampled_from(["", "", "", ", train_on: all", ", on_overlong: split", ", eval_rows: 1"])),
    )
    command = draw(st.sampled_from([["check"]] * 3 + [["check", "--json"], ["preview"], ["preview", "--json"]]))
    files = {"run.yaml": run_file, f"rows.{kind}": content.decode("latin-1")}
    return {"args": ["data", *command, "run.yaml"], "files": files}


def list_options() -> dict[tuple[str, ...], list[str]]:
    """Lists the options of every command that does not train."""
    root = typer.main.get_command(app)
    found = {}
    for name in {*COMMANDS} - LEFT_OUT:
        command = root.get_command(None, name)
        inner = {(name, one): command.get_command(None, one) for one in getattr(command, "functions", ())}
        for words_, one in (inner or {(name,): command}).items():
            found[words_] = [option for p in one.params for option in p.opts if option.startswith("-")]
    return dict(sorted(found.items()))


OPTIONS = list_options()
BESIDE = {
    "run.yaml": _write_valid(1).decode("latin-1"),
    "broken.yaml": "model: [\n",
    "rows.jsonl": '{"text": "a b c"}\n',
    "small.yaml": "model: {name: forge-tiny}\ndata: {train: rows.jsonl, max_length: 64}\n",
    "config.json": '{"model_type": "llama", "hidden_size": 64}',
}
arguments = st.one_of(
    st.sampled_from(
        [*BESIDE, "missing.yaml", ".", "quickstart", "sft-lora", "qlora-7b", "llama-3.1-8b", "h100", "a100:8"]
    ),
    st.sampled_from(
        ["../../etc/passwd", "/dev/zero", "/proc/self/mem", "~", "-", "--", "=", "2/h", "80GB", "seq", "zero3"]
    ),
    st.tuples(st.sampled_from(list_leaf_paths()), words).map(lambda one: f"{one[0]}={one[1][:5000]}"),
    st.tuples(st.sampled_from(list_leaf_paths()), st.integers()).map(lambda one: f"{one[0]}={one[1]}"),
    words.map(lambda one: one[:5000]),
    st.text(max_size=20),
    st.binary(max_size=12).map(lambda one: one.decode("utf-8", "surrogateescape")),
).map(lambda one: one.replace("\0", ""))  # no shell can hand over a NUL


@st.composite
def argument_cases(draw) -> Case:
    """A command with options that it has or has not, and values of any kind."""
    command = draw(st.sampled_from(list(OPTIONS)))
    options = [one for one in OPTIONS[command] if one not in LEFT_OUT] + ["--debug", "--help", "--no-such"]
    file = st.sampled_from(["run.yaml", "small.yaml", "quickstart"])
    args = [draw(st.one_of(file, file, file, arguments))]
    for kind in draw(st.lists(st.sampled_from(["option", "option", "set", "value"]), max_size=4)):
        if kind == "set":
            args += ["--set", draw(arguments)]
        else:
            args += [draw(st.sampled_from(options)), draw(arguments)] if kind == "option" else [draw(arguments)]
    if any(one in args or one in command for one in WRITING):  # a path that was asked for may be written to
        args = [one for one in args if not one.startswith(("/", "~")) and ".." not in one]
    args = [one for one in args if not one.startswith(("--trace", "--calibrate"))]
    dry = ["--dry-run"] if command == ("train",) else []
    return {"args": [*command, *dry, *args], "files": BESIDE}


PARTS = {"yaml": yaml_cases, "rows": data_cases(), "arguments": argument_cases()}


def generate(part: str, start: int, count: int) -> Iterator[Case]:
    """Yields cases of a part; the same ones for the same number."""
    drawn: list[Case] = []

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(PARTS[part])
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return iter(drawn)
