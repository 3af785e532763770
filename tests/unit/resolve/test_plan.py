"""The plan: one error for everything, a digest, plan.yaml, and who said so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge_cli.errors import ConfigError, ModelError
from forge_cli.facts.layer_count import count_frozen_layers
from forge_cli.resolve.plan import dump_plan, explain, resolve_mapping, resolve_plan, spec_digest
from forge_cli.resolve.plan_text import write_value
from forge_cli.resolve.schema_tree import find_field, find_sections, list_leaf_paths
from forge_cli.resolve.unknown_keys import load_foreign_keys
from forge_cli.resolve.yaml_reader import parse_value

BASE = "model: {name: forge-tiny}\ndata: {train: forge:quickstart/train, max_length: 128}\n"
CHECKOUT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parents[2] / "golden" / "errors"
FULL = """
preset: qlora
model: {name: forge-tiny}
name: "2024"
lora: {r: 8, modules_to_save: [lm_head], target_modules: [q_proj, "self_attn.v_proj"]}
freeze: {first: 50%, patterns: ["*.mlp.*"]}
ema: {decay: 0.9}
data: {train: forge:quickstart/train, eval: "forge:quickstart/heldout", max_length: 128}
training: {max_steps: 7, learning_rate: 3e-4, warmup_steps: 2}
report: {prompts: ["a: b #c", 'say "hi"\\n', "\\u00e9 \\u2028 \\x7f", "no", "10", "", "\\U0001F600"]}
monitor: null
"""


def run_in_checkout(code: str, *arguments: object, seed: str = "0") -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    result = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_golden_file_of_six_mistakes():
    files = sorted(GOLDEN.glob("*.yaml"))
    assert files
    for file in files:
        with pytest.raises(ConfigError) as caught:
            resolve_plan(file)
        text = "\n".join(map(str, caught.value.problems)).replace(str(file), file.name) + "\n"
        assert text == file.with_suffix(".txt").read_text(), text


def test_six_different_mistakes_are_six_problems_in_the_order_of_the_file(problems_of):
    text = (
        "model: {name: forge-tiny}\n"
        "data: {train: missing.jsonl, max_length: yes}\n"
        "lr: 1\n"
        "training: {optim: adam, max_steps: 5}\n"
        "quantization: {bits: 4}\n"
        "ema: {update_after_step: 9}\n"
    )
    problems = problems_of(text)
    assert [one.where for one in problems] == [
        "run.yaml:2:8", "run.yaml:2:42", "run.yaml:3:1", "run.yaml:4:12", "run.yaml:5:1", "run.yaml:6:7",
    ]  # fmt: skip
    assert all(one.fix for one in problems)


def test_a_good_file_imports_nothing_it_does_not_need(write):
    code = """
import sys
from pathlib import Path
from forge_cli.resolve.plan import resolve_plan
resolve_plan(Path(sys.argv[1]))
heavy = {"torch", "transformers", "datasets", "numpy", "rich"}
late = {"forge_cli.resolve." + n for n in ("nearness", "unknown_keys", "value_faults", "syntax_faults", "plan_text")}
sys.exit(str((heavy | late) & set(sys.modules)) if (heavy | late) & set(sys.modules) else 0)
"""
    run_in_checkout(code, write(BASE + "preset: qlora\nlora: {r: 8}\n").resolve())


def test_plan_yaml_gives_the_same_digest(write):
    plan = resolve_plan(write(FULL))
    again = resolve_plan(write(dump_plan(plan), "plan.yaml"))
    assert again.digest == plan.digest
    assert again.spec.report == plan.spec.report and again.spec.lora == plan.spec.lora
    assert again.spec.preset is None and plan.spec.preset == "qlora"
    assert dump_plan(again).split("\n")[1] == dump_plan(plan).split("\n")[1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "quantization: {bits: 8}\nlora: {}\n",
        "preset: memory_efficient\ntraining: {max_steps: 3}\n",
        "logging: {logging_steps: 3}\ncheckpoint: {save_steps: 2}\n"
        "training: {max_steps: 3, lr_scheduler_type: constant}\n",
        "report: null\ncheckpoint: null\nmonitor: null\n",
    ],
)
def test_plan_yaml_round_trips(write, text):
    plan = resolve_plan(write(BASE + text))
    assert resolve_plan(write(dump_plan(plan), "plan.yaml")).digest == plan.digest


def test_plan_yaml_names_the_origin_of_every_value(plan_of):
    text = dump_plan(plan_of("preset: lora\nlora: {r: 8}\n", "lora.lora_alpha=5"))
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["r"].endswith("# run.yaml:4:8") and lines["lora_alpha"].endswith("# --set")
    assert "preset lora (lora.yaml:" in lines["lora_dropout"] and lines["seed"].endswith("# schema default")
    for path in list_leaf_paths():
        name = path.rpartition(".")[2]
        section_off = path.startswith(("freeze.", "ema.", "quantization."))
        # A section that is idle as a whole says so once.
        section_off = section_off or f"# {path.partition('.')[0]} has no effect: " in text
        assert section_off or name in ("preset", "extends") or name in text, path


@pytest.mark.parametrize(
    "value",
    ["yes", "010", "a: b", " x", "x ", "-", "#a", "a #b", "", "null", "2e-4", "%x", "é", "\x85\u2028\ufeff", "'", '"',
     "\\", "line\nline", "\t", "*x", "50%", "all-linear", "./a/b.jsonl", "forge:x", "12:30", 3, 2.5, 1e-5, 1e300,
     0.1 + 0.2, 5e-324, 123456789.123, True, None, [], ["a", "no"], "😀"],
)  # fmt: skip
def test_written_values_read_back(value):
    assert parse_value(write_value(value)) == value


def test_digest_ignores_what_does_not_train(plan_of):
    digest = plan_of().digest
    assert plan_of("name: a\noutput_dir: b\n").digest == digest
    assert plan_of("training: {num_train_epochs: 3.0}\n").digest == digest
    assert plan_of("seed: 1\n").digest != digest
    # Epochs have no effect beside max_steps.
    steps = "training: {max_steps: 3}\n"
    assert plan_of(steps).digest == plan_of("training: {num_train_epochs: 9}\n", "training.max_steps=3").digest
    assert len(digest) == 64 and spec_digest(plan_of().spec) == digest


def test_digest_is_stable_across_processes(write):
    path = write(BASE).resolve()
    code = """
import sys
from pathlib import Path
from forge_cli.resolve.plan import resolve_plan
print(resolve_plan(Path(sys.argv[1])).digest)
"""
    digests = {run_in_checkout(code, path, seed=seed).strip() for seed in ("1", "2")}
    assert digests == {resolve_plan(path).digest}


def test_mapping_is_the_same_as_the_file(plan_of):
    values = {
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "max_length": 128},
        "lora": {"target_modules": ("q_proj", "v_proj")},
        "output_dir": Path("runs"),
    }
    plan = resolve_mapping(values, ["lora.r=4"])
    assert plan.digest == plan_of("lora: {r: 4, target_modules: [q_proj, v_proj]}\n").digest
    assert plan.history["lora.target_modules"][-1].value == ("q_proj", "v_proj")
    with pytest.raises(ConfigError, match=r"settings lora\.r: must be a number that is at least 1"):
        resolve_mapping({**values, "lora": {"r": 0}})


def test_explain_says_who_hid_whom(plan_of):
    plan = plan_of("preset: lora\nlora: {r: 8}\n", "lora.r=4", "monitor=null")
    one = explain(plan, "lora.r")[0]
    assert (one.value, one.origin.where) == (4, "--set")
    assert [hidden.value for hidden in one.hidden] == [8, 16, 16]
    assert "hides 8  (run.yaml:4:8)" in str(one)
    assert len(explain(plan, "lora")) == len(find_sections()["lora"].model_fields)
    assert explain(plan, "monitor")[0].origin.where == "--set"
    assert explain(plan, "monitor.gradients")[0].idle == "monitor is off"
    assert "evaluation rows" in explain(plan, "evaluation.eval_steps")[0].idle
    assert len(explain(plan, "")) > 40
    with pytest.raises(ConfigError, match=r"did you mean lora\.r"):
        explain(plan, "lora.rr")


def test_derived_values(plan_of):
    derived = plan_of("training: {per_device_train_batch_size: 3, gradient_accumulation_steps: 5}\n").derived
    assert derived.effective_batch_size == 15 and derived.num_frozen_layers == 0
    layers = plan_of().facts.num_hidden_layers
    frozen = plan_of("freeze: {first: 50%}\n").derived
    assert frozen.num_frozen_layers == layers // 2 and "50%" in frozen.reasons["num_frozen_layers"]
    unknown = plan_of("freeze: {first: 50%}\n", "model.name=nobody/knows").derived
    assert unknown.num_frozen_layers is None


@pytest.mark.parametrize(("first", "count"), [(None, 0), (3, 3), ("50%", 16), ("29%", 9), ("12.5%", 4), ("99%", 31)])
def test_count_frozen_layers(first, count):
    assert count_frozen_layers(first, 32) == count


def test_ema_warnings(plan_of):
    warm = plan_of("ema: {decay: 0.999}\ntraining: {max_steps: 100}\n").derived.warnings
    assert len(warm) == 1 and "half-life of 693 steps" in warm[0] and "ends at 0.918" in warm[0]
    cold = plan_of("ema: {decay: 0.999, decay_warmup: false}\ntraining: {max_steps: 100}\n").derived.warnings
    assert "0.933 has a tenth of the run" in cold[0]
    assert plan_of("ema: {decay: 0.9}\ntraining: {max_steps: 100}\n").derived.warnings == ()


def test_a_broken_model_folder_keeps_its_exit_code(write, tmp_path):
    (tmp_path / "m").mkdir()
    text = BASE.replace("forge-tiny", "./m")
    with pytest.raises(ModelError) as caught:
        resolve_plan(write(text))
    assert caught.value.problems[0].where == "run.yaml:1:9"
    with pytest.raises(ConfigError) as both:
        resolve_plan(write(text + "lr: 1\n"))
    assert len(both.value.problems) == 2


def test_sources_written_in_different_ways_are_the_same_plan(write):
    """plan.yaml writes the shortest form, and reads back as the same plan."""
    (write("x: 1\n").parent / "a.jsonl").touch()
    one = ["a.jsonl", "{path: a.jsonl}", "[a.jsonl]", "[{path: a.jsonl, weight: 1.0}]"]
    many = ["[a.jsonl, {path: hf://o/n@v1, rows: 5, columns: {prompt: the question}}]"]
    plans = {}
    for text in one + many:
        plan = resolve_plan(write(f"model: {{name: forge-tiny}}\ndata: {{train: {text}, max_length: 64}}\n"))
        again = resolve_plan(write(dump_plan(plan)))
        assert again.digest == plan.digest, dump_plan(plan)
        plans[text] = plan.digest
    assert len({plans[text] for text in one}) == 1
    assert len(set(plans.values())) == 2


def test_foreign_keys_point_into_the_schema():
    keys = load_foreign_keys()
    assert len(keys) > 150
    leaves = {path.rpartition(".")[2] for path in list_leaf_paths()} | set(find_sections())
    for name, (target, note) in keys.items():
        assert target or note, name
        assert target is None or find_field(target) is not None, name
        assert name not in leaves and find_field(name) is None, name
        assert name == name.lower() and "-" not in name, name
        assert not target or not note.startswith(target), name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr: 1", "training.learning_rate"),
        ("micro_batch_size: 1", "training.per_device_train_batch_size"),
        ("sequence_len: 1", "data.max_length"),
        ("cutoff_len: 1", "data.max_length"),
        ("max_seq_length: 1", "data.max_length"),
        ("lora_rank: 1", "lora.r"),
        ("lora_alpha: 1", "belongs under lora: lora.lora_alpha"),
        ("torch_dtype: 1", "model.dtype"),
        ("warmup_ratio: 0.1", "training.warmup_steps; a share below 1"),
        ("load_in_4bit: true", "quantization.bits"),
        ("adapter: qlora", "write lora: {}"),
        ("Learning-Rate: 1", "training.learning_rate"),
        ("training.learning_rate: 1", "write training: {learning_rate: ...}"),
        ("rope_theta_x: 1", "the top level has version"),
        ("lora: {lora: 3}", "lora is a section at the top level"),
        ("ema: {enabled: true}", "a section is on when it is there"),
        ("training: {warmup_ratio: 0.1}", "training.warmup_steps"),
        ("training: {dtype: bf16}", "training.precision"),
        ("lora: {alpha: 1}", "lora.lora_alpha"),
        ("training: {train: x}", "belongs under data: data.train"),
        ("data: {name: x}", "data.train"),
    ],
)
def test_keys_from_elsewhere(problems_of, line, words):
    problems = problems_of((BASE if "data:" not in line else "model: {name: somebody/something}\n") + line + "\n")
    assert len(problems) == 1 and words in str(problems[0]), problems


@pytest.mark.parametrize(
    "secret",
    ["hf_abcdEFGH12345678", "sk-proj-abcdefgh12345678", "AKIAIOSFODNN7EXAMPLE", "https://me:pa55word@host/x",
     "ghp_abcdefghijklmnop1234"],
)  # fmt: skip
@pytest.mark.parametrize(
    "line",
    ["name: '{}'", "report: {{prompts: ['x {} y']}}", "token: '{}'", "data: {{train: '{}'}}", "'{}': 1", "a: @{}"],
)
def test_secrets_are_refused_and_masked(problems_of, secret, line):
    base = BASE if "data:" not in line else "model: {name: forge-tiny}\n"
    problems = problems_of(base + line.format(secret) + "\n")
    bare = secret.removeprefix("https://").removesuffix("@host/x")
    assert bare not in "\n".join(map(str, problems))
    if not line.startswith(("'{}'", "a: @")):
        assert any("access token or a password" in str(one) and "***" in str(one) for one in problems)


def test_no_secret_in_ordinary_words(plan_of):
    plan_of("report: {prompts: ['task-12345678901', 'https://host/a:b', 'shelf_abcdefghij', 'a@b:c']}\n")


def test_secret_in_an_override(problems_of):
    for override in ("name=hf_abcdEFGH12345678", "hf_abcdEFGH12345678", "hf_abcdEFGH12345678=1"):
        problems = problems_of(BASE, override)
        assert "abcdEFGH" not in str(problems)


def test_echoed_values_are_short_and_harmless(problems_of):
    problems = problems_of(BASE + 'training: {optim: "\\e[31m' + "x" * 500 + '"}\n')
    assert "\x1b" not in str(problems[0]) and "\\x1b[31m" in str(problems[0]) and len(str(problems[0])) < 400
