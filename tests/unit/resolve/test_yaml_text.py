"""Catalogue A of the faults: what can be wrong with the text of a run file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from forge_cli.errors import ConfigError
from forge_cli.resolve.nearness import find_nearest
from forge_cli.resolve.plan import resolve_plan
from forge_cli.resolve.scalars import ScalarFault, resolve_scalar
from forge_cli.resolve.schema_tree import find_sections
from forge_cli.resolve.yaml_reader import Position, parse_value, read_yaml, read_yaml_text

BASE = "model: {name: forge-tiny}\ndata: {train: forge:quickstart/train, max_length: 128}\n"
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
DOUBLING = "a: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 22))

# id, text below the base (or the whole text, in bytes), place, words
FAULTS = [
    ("A01 tab", "training:\n\tmax_steps: 3\n", "run.yaml:4:1", ["tabs", "use spaces"]),
    ("A02 twice, top", "seed: 1\nlora: {}\nseed: 2\n", "run.yaml:5:1", ["lines 3 and 5"]),
    ("A02 twice, nested", "lora:\n  r: 8\n  r: 9\n", "run.yaml:5:3", ["lines 4 and 5"]),
    ("A03 unknown", "training: {learning_rat: 1}\n", "run.yaml:3:12", ["unknown key", "did you mean learning_rate?"]),
    ("A04 section", "learning_rate: 2e-4\n", "run.yaml:3:1", ["belongs under training: training.learning_rate"]),
    ("A06 value", "name: on\n", "run.yaml:3:7", ["quote it", "true or false"]),
    ("A06 key", "on: 1\n", "run.yaml:3:1", ['quote it ("on")']),
    ("A07 octal", "seed: 010\n", "run.yaml:3:7", ["octal", "10"]),
    ("A07 underscore", "training: {max_steps: 1_000}\n", "run.yaml:3:12", ["expected a whole number", "1000"]),
    ("A07 base 60", "training: {learning_rate: 1:30}\n", "run.yaml:3:12", ['the text "1:30"']),
    ("A07 date", "seed: 2024-01-01\n", "run.yaml:3:1", ['the text "2024-01-01"']),
    ("A08 nan", "training: {learning_rate: .nan}\n", "run.yaml:3:12", ["more than 0 and at most 1", ".nan"]),
    ("A08 inf", "training: {weight_decay: .inf}\n", "run.yaml:3:12", ["at least 0", ".inf"]),
    ("A08 negative", "training: {learning_rate: -1}\n", "run.yaml:3:12", ["more than 0", "-1"]),
    ("A08 zero", "lora: {r: 0}\n", "run.yaml:3:8", ["at least 1", "write for example r: 16"]),
    ("A09 list", "lora: {target_modules: q_proj}\n", "run.yaml:3:8", ["write target_modules: [q_proj]"]),
    ("A09 int", 'lora: {r: "8"}\n', "run.yaml:3:8", ["whole number", "write r: 8, without quotes"]),
    ("A09 None", "training: {max_steps: None}\n", "run.yaml:3:12", ["write max_steps: null"]),
    ("A09 item", "logging: {report_to: [wandbb]}\n", "run.yaml:3:23", ["did you mean wandb?"]),
    ("A10 bomb", BOMB, "run.yaml:7:10", ["aliases expand to more than 10000 values"]),
    ("A11 merge", DOUBLING, "run.yaml:5:3", ["merge keys", "extends:"]),
    ("A12 recursive", "x: &x {y: *x}\n", "run.yaml:3:11", ["contains itself"]),
    ("A13 depth", "x: " + "[" * 1000, "run.yaml:3:44", ["nested more than 40 levels"]),
    ("A14 keys", "x:\n" + "".join(f"  k{i}: 1\n" for i in range(60_000)), "run.yaml:", ["more than 10000 values"]),
    ("A14 size", b"a: " + b"x" * 2_000_000, "run.yaml", ["2000003 bytes", "at most 1000000"]),
    ("A15 latin", b"name: caf\xe9\n", "run.yaml:1:10", ["0xe9", "number 9", "UTF-8"]),
    ("A15 NUL", b"name: a\0b\n", "run.yaml:1:8", ["U+0000", "byte 7"]),
    ("A15 control", "name: é\x1b[31m\n".encode(), "run.yaml:1:8", ["U+001B", "byte 8"]),
    ("A15 UTF-16", "name: a\n".encode("utf-16"), "run.yaml:1:1", ["UTF-16", "save it as UTF-8"]),
    ("A15 UTF-16 without mark", "name: a\n".encode("utf-16-be"), "run.yaml:1:1", ["UTF-16"]),
    ("A16 python", "name: !!python/object/apply:os.system [touch x]\n", "run.yaml:3:7", ["tags are not allowed"]),
    ("A16 local", "name: !foo x\n", "run.yaml:3:7", ["tags are not allowed: !foo"]),
    ("A16 binary", "name: !!binary aGk=\n", "run.yaml:3:7", ["tags are not allowed: !!binary"]),
    ("A16 set", "lora: !!set {r: 8}\n", "run.yaml:3:7", ["tags are not allowed: !!set"]),
    ("A17 two documents", "---\nseed: 1\n", "run.yaml:3:1", ["second document"]),
    ("A17 empty", b"", "run.yaml:1:1", ["empty or holds comments only"]),
    ("A17 comment", b"# hello\n", "run.yaml:1:1", ["empty or holds comments only"]),
    ("A17 list", b"- a\n- b\n", "run.yaml:1:1", ["holds a list"]),
    ("A17 scalar", b"hello there\n", "run.yaml:1:1", ["holds one value"]),
    ("A17 no space", b"lr:1\n", "run.yaml:1:1", ["put a space after the colon"]),
    ("A17 no value", "lora:\n", "run.yaml:3:1", ["there is no value", "{}", "null"]),
    ("A18 braces", "name: {{ x }}\n", "run.yaml:3:8", ["quote it"]),
    ("A18 at", "name: @x\n", "run.yaml:3:7", ["cannot start with @", 'quote it: "@x"']),
    ("A18 percent", "name: %x\n", "run.yaml:3:7", ["cannot start with %", 'quote it: "%x"']),
    ("A18 colon", "output_dir: C:\\x: y\n", "run.yaml:3:17", ["quote it: 'C:\\x: y'"]),
    ("A18 star", "freeze: {patterns: [*.mlp.*]}\n", "run.yaml:3:21", ['quote it: "*.mlp.*"']),
    ("A18 bracket", "lora: {target_modules: [a, b}\n", "run.yaml:3:29", ["a [ is not closed"]),
    ("A18 bracket to the end", "lora:\n  target_modules: [a, b\nseed: 1\n", "run.yaml:4:19", ["a [ is not closed"]),
    ("A18 comma", "lora: {\n  r: 1\n  lora_alpha: 2\n}\n", "run.yaml:5:13", ["a comma is missing"]),
    ("A18 quote", "name: 'a\nseed: 1\n", "run.yaml:3:7", ["a quote is not closed"]),
    ("A18 quote closed late", "name: 'a\noutput_dir: 'b'\n", "run.yaml:3:7", ["or only on line 4"]),
    ("A18 key alone", "lora:\n  r\n  lora_alpha: 2\n", "run.yaml:4:3", ["a key without a colon"]),
    ("A18 indentation", "lora:\n  r: 1\n    lora_alpha: 2\n", "run.yaml:5:15", ["indent"]),
    ("A19 digits", "seed: " + "9" * 5000 + "\n", "run.yaml:3:7", ["5000 digits"]),
    ("A23 boolean", "version: true\n", "run.yaml:3:1", ["a whole number", "write for example version: 1"]),
    ("A23 newer", "version: 99\n", "run.yaml:3:1", ["version 99", "update Forge"]),
    ("I03 preset path", "preset: ../../etc/passwd\n", "run.yaml:3:1", ["there is no preset"]),
    ("I04 name", "name: a/../b\n", "run.yaml:3:1", ["not a folder name"]),
]


@pytest.mark.parametrize(
    ("text", "place", "words"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_fault_is_one_located_problem(problems_of, text, place, words):
    started = time.process_time()
    problems = problems_of(BASE + text if isinstance(text, str) else text)
    assert time.process_time() - started < 1
    found = [one for one in problems if all(word in str(one) for word in words)]
    assert found, "\n".join(map(str, problems))
    assert found[0].where.startswith(place), found[0]
    assert len(str(found[0])) < 400
    if not text.startswith(("a0", "a: &a0", "x:")) if isinstance(text, str) else True:
        assert len(problems) == 1, "\n".join(map(str, problems))
    assert os.listdir() == ["run.yaml"]


def test_the_catalogue_is_covered():
    assert {f"A{number:02}" for number in range(1, 20)} - {"A05"} <= {fault[0][:3] for fault in FAULTS}


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "2E-4", ".2e-3", "+2e-04"])
def test_a05_exponents_are_numbers(plan_of, text):
    assert plan_of(f"training: {{learning_rate: {text}}}\n").spec.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e5", 1e5), ("1.0e3", 1e3), ("12", 12), ("-3", -3), ("0", 0), ("0x1F", 31), ("0o17", 15), ("~", None),
        ("null", None), ("true", True), ("False", False), ("12:30", "12:30"), ("1_000", "1_000"), ("50%", "50%"),
        ("2024-01-01", "2024-01-01"), ("nothing", "nothing"), ("1.", 1.0), (".inf", float("inf")), ("+", "+"),
        ("1e", "1e"), ("0.5", 0.5), ("٣", "٣"), ("1,000", "1,000"), ("Yes!", "Yes!"), ("-", "-"), ("0", 0),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    got = resolve_scalar(text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["yes", "No", "ON", "off", "y", "N", "010", "-07", "00"])
def test_words_that_mean_two_things_are_refused(text):
    with pytest.raises(ScalarFault):
        resolve_scalar(text)


def test_quotes_make_text():
    assert read_yaml_text("a: 'yes'\nb: \"010\"\nc: |\n  on\n", "f").data == {"a": "yes", "b": "010", "c": "on\n"}


def test_positions_of_keys_and_items():
    positions = read_yaml_text("a: 1\nb:\n  c: [x, y]\n", "f").positions
    assert positions["b", "c"] == Position(3, 3)
    assert positions["b", "c", 1] == Position(3, 10)


def test_a15_byte_order_mark_is_fine(write):
    assert read_yaml(write(b"\xef\xbb\xbfa: 1\n")).data == {"a": 1}


def test_aliases_are_values():
    document = read_yaml_text("a: &x [1, 2]\nb: *x\nc: {d: *x}\n", "f")
    assert document.data == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    assert document.where(("c", "d", 1)) == "f:3:5"


def test_alias_chain_deeper_than_the_limit_is_refused():
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(ConfigError, match="levels deep"):
        read_yaml_text(text, "f")


def test_reading_goes_on_after_recoverable_faults():
    document = read_yaml_text("a: yes\nb: !x 1\nc: 010\nd: *q\ne: 1\ne: {z: no}\n<<: {}\n? [k]\n: v\n", "f")
    assert [one.where for one in document.problems] == [
        f"f:{n}" for n in ("1:4", "2:4", "3:4", "4:4", "6:1", "6:8", "7:1", "8:3")
    ]
    assert document.data["e"] == 1


@pytest.mark.parametrize("make", ["missing", "folder", "fifo", "device", "unreadable"])
def test_a20_only_regular_files_are_read(make, tmp_path):
    path = tmp_path / "run.yaml"
    words = {"missing": "no such file", "folder": "folder", "fifo": "pipe or a device", "device": "pipe or a device"}
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "device":
        path = Path("/dev/zero")
    elif make == "unreadable":
        path.write_text("a: 1")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    with pytest.raises(ConfigError, match=words.get(make, "cannot be read")) as caught:
        resolve_plan(path)
    assert caught.value.exit_code == 2 and str(path) in str(caught.value)


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "qlora.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*qlora\.yaml"):
        resolve_plan(tmp_path / "qlroa.yaml")


def test_a03_every_key_one_edit_away_is_recognised(problems_of):
    count = 0
    for section, owner in find_sections().items():
        for name in owner.model_fields:
            for wrong in {name[:-1] + "x" + name[-1], name[1:], name[:1] + name, name[:2] + name[3:]} - {name}:
                # Without its first letter, undesirable_weight is as near to desirable_weight.
                if len(wrong) >= 3 and not {wrong, wrong[1:]} & {*owner.model_fields}:
                    assert find_nearest(wrong, owner.model_fields) == name, (section, wrong)
                    count += 1
    assert count > 150


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("[a, b]", ["a", "b"]), ("{r: 8}", {"r": 8}), ("null", None), ("50%", "50%")]
)
def test_set_values_follow_the_file(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["yes", "010", "", "!x 1", "@x", "[a", "a\n---\nb"])
def test_set_values_are_checked_like_the_file(text):
    with pytest.raises(ConfigError):
        parse_value(text)
