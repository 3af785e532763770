"""Catalogue B of the faults: settings that are fine alone and wrong together."""

from __future__ import annotations

import pytest

from forge_cli.resolve.contradictions import RULES
from forge_cli.resolve.plan import resolve_plan

MODEL = "model: {name: forge-tiny}\n"
DATA = "data: {train: forge:quickstart/train, max_length: 128}\n"
EVAL = "data: {train: forge:quickstart/train, eval: forge:quickstart/heldout, max_length: 128}\n"
HUB = "model: {name: org/name}\n"

# text, place of the one problem, words in it
CLASHES = [
    (MODEL + DATA + "quantization: {bits: 4}\n", "3:1 quantization", ["4-bit", "add lora: {}"]),
    (MODEL + DATA + "preset: qlora\nlora: null\n", "4:1 lora", ["4-bit", "cannot be trained"]),
    (MODEL + DATA + "freeze: {}\n", "3:1 freeze", ["freezes nothing"]),
    (MODEL + DATA + "freeze: {first: null}\n", "3:1 freeze", ["freezes nothing"]),
    (MODEL + DATA + "freeze: {first: 100%}\n", "3:10 freeze.first", ["100% would leave no layer"]),
    (MODEL + DATA + "freeze: {first: 0%}\n", "3:10 freeze.first", ["not a share"]),
    (MODEL + DATA + 'freeze: {first: "half"}\n', "3:10 freeze.first", ["neither a count nor a share"]),
    (MODEL + DATA + "freeze: {first: 0}\n", "3:10 freeze.first", ["the least is 1"]),
    (MODEL + DATA + "freeze: {first: 0.5}\n", "3:10 freeze.first", ["expected a whole number or text", '"50%"']),
    (MODEL + DATA + "freeze: {first: 999}\n", "3:10 freeze.first", ["999 layers to freeze, but the model has"]),
    (MODEL + DATA + "freeze: {first: 1%}\n", "3:10 freeze.first", ["less than one layer"]),
    (HUB.replace("org/name", "gpt2") + DATA + "freeze: {first: 12}\n", "3:10 freeze.first", ["all 12 layers", "11"]),
    (MODEL + DATA + 'freeze: {patterns: ["*"]}\n', "3:10 freeze.patterns", ["whole model"]),
    (MODEL + DATA + 'freeze: {patterns: ["*.mpl.*"]}\n', "3:10 freeze.patterns", ["*.mpl.* matches no", "q_proj"]),
    (MODEL + DATA + "lora: {}\nfreeze: {first: 50%, embeddings: true}\n", "4:22 freeze.embeddings", ["no effect"]),
    (
        MODEL + DATA + "lora: {modules_to_save: [embed_tokens]}\nfreeze: {first: 50%, embeddings: true}\n",
        "4:22 freeze.embeddings",
        ["frozen here and trained", "embed_tokens"],
    ),
    (
        MODEL + DATA + "lora: {}\nquantization: {bits: 8, bnb_4bit_quant_type: fp4}\n",
        "4:25 quantization.bnb_4bit_quant_type",
        ["no effect", "bits is 8"],
    ),
    (MODEL + DATA + "training: {max_steps: 10, warmup_steps: 10}\n", "3:27 training.warmup_steps", ["warm-up", "10"]),
    (MODEL + DATA + "training: {warmup_steps: 1.5}\n", "3:12 training.warmup_steps", ["1.5", "share"]),
    (
        MODEL + DATA + "training: {warmup_steps: 5, lr_scheduler_type: constant}\n",
        "3:12 training.warmup_steps",
        ["no effect", "constant_with_warmup"],
    ),
    (
        MODEL + DATA + "training: {max_steps: 5}\ncheckpoint: {save_steps: 6}\n",
        "4:14 checkpoint.save_steps",
        ["every 6", "has 5"],
    ),
    (
        MODEL + DATA + "training: {max_steps: 5}\nlogging: {logging_steps: 6}\n",
        "4:11 logging.logging_steps",
        ["every 6", "has 5"],
    ),
    (
        MODEL + EVAL + "training: {max_steps: 5}\nevaluation: {eval_steps: 6}\n",
        "4:14 evaluation.eval_steps",
        ["every 6"],
    ),
    (MODEL + EVAL + "evaluation: {eval_steps: 0}\n", "3:14 evaluation.eval_steps", ["at least 1"]),
    (MODEL + DATA + "checkpoint: {save_steps: -1}\n", "3:14 checkpoint.save_steps", ["at least 1"]),
    (MODEL + DATA + "training: {max_steps: 5, num_train_epochs: 2}\n", "3:26 training.num_train_epochs", ["no effect"]),
    (MODEL + DATA + "evaluation: {eval_steps: 5}\n", "3:14 evaluation.eval_steps", ["no evaluation rows", "data.eval"]),
    (MODEL + DATA + "report: {exact_match: true}\n", "3:10 report.exact_match", ["needs evaluation rows"]),
    (MODEL + DATA + "report: {samples: 3}\n", "3:10 report.samples", ["no evaluation rows"]),
    (MODEL + DATA + "report: {max_new_tokens: 3}\n", "3:10 report.max_new_tokens", ["generates no answers"]),
    (MODEL + EVAL + "report: {samples: 0}\n", "3:10 report.samples", ["generates no answers", "report: null"]),
    (MODEL + EVAL.replace("}", ", eval_fraction: 0.1}"), "2:88 data.eval_fraction", ["keep one"]),
    (HUB + "data: {train: hf://org/set, eval: hf://org/set}\n", "2:29 data.eval", ["both trained on and evaluated on"]),
    (HUB + "data: {train: org/set, eval_rows: 9, eval_fraction: 0.1}\n", "2:24 data.eval_rows", ["keep one"]),
    (MODEL + DATA.replace("}", ", packing: true, padding_free: true}"), "2:71 data.padding_free", ["packed sequences"]),
    (MODEL + DATA.replace("}", ", streaming: true}"), "2:56 data.streaming", ["no known number", "max_steps"]),
    (MODEL + DATA.replace("}", ", max_bad_ratio: 0.5}"), "2:56 data.max_bad_ratio", ["no effect", "on_bad_row"]),
    (MODEL + DATA.replace("}", ", max_lost_ratio: 0.5}"), "2:56 data.max_lost_ratio", ["no effect", "on_overlong"]),
    (HUB + "data: {train: [train.jsonl, {path: x.csv}]}\n", "2:8 data.train", ["no such file: x.csv"]),
    (HUB + "data: {train: {rows: 5}}\n", "2:8 data.train.path", ["is missing"]),
    (HUB + "data: {train: [{path: org/set, row: 5}]}\n", "2:32 data.train[0].row", ["unknown key", "rows?"]),
    (
        MODEL
        + DATA.replace("train: ", "train: {path: ").replace(", max", ", rows: 5}, streaming: true, max")
        + "training: {max_steps: 5}\n",
        "2:8 data.train",
        ["drawn from all rows"],
    ),
    (HUB + "data: {train: {path: org/set, weight: -1}}\n", "2:31 data.train.weight", ["more than 0", "-1"]),
    (HUB + 'data: {train: {path: org/set, rows: "5"}}\n', "2:31 data.train.rows", ["whole number", "write rows: 5"]),
    (HUB + "data: {train: {path: org/set, columns: [a]}}\n", "2:31 data.train.columns", ["names with their values"]),
    (HUB + "data: {train: []}\n", "2:8 data.train", ["expected text"]),
    (HUB + "data: {train: 7}\n", "2:8 data.train", ["expected text or a source", "7"]),
    ("model: {name: forge-tiny, revision: main}\n" + DATA, "1:27 model.revision", ["no effect", "hub"]),
    (HUB.replace("org/name", "gpt2") + DATA.replace("128", "1025"), "2:39 data.max_length", ["1025", "1024 positions"]),
    (HUB.replace("org/name", "gpt2") + DATA.replace(", max_length: 128", ""), "1:9 model.name", ["2048", "1024"]),
    (
        MODEL + DATA + "ema: {update_after_step: 5}\ntraining: {max_steps: 5}\n",
        "3:7 ema.update_after_step",
        ["after step 5"],
    ),
    (MODEL + DATA + "ema: {update_every: 6}\ntraining: {max_steps: 5}\n", "3:7 ema.update_every", ["no step of 5"]),
    (MODEL + DATA + "lora: {target_modules: []}\n", "3:8 lora.target_modules", ["empty", "all-linear"]),
    (
        MODEL + DATA + "lora: {target_modules: [q_proj, lm_head]}\n",
        "3:8 lora.target_modules",
        ["lm_head", "modules_to_save"],
    ),
    (
        MODEL + DATA + "lora: {target_modules: [q_proj, v_proj], modules_to_save: [v_proj]}\n",
        "3:8 lora.target_modules",
        ["v_proj would be"],
    ),
    (
        MODEL + DATA + "lora: {r: 7, init_lora_weights: orthogonal}\n",
        "3:14 lora.init_lora_weights",
        ["even rank", "r: 8"],
    ),
    (MODEL.replace("}", ", dtype: float16}") + DATA, "1:27 model.dtype", ["float16 weights cannot be trained"]),
    (
        MODEL.replace("}", ", dtype: float16}") + DATA + "training: {precision: fp16}\n",
        "1:27 model.dtype",
        ["fp16 mixed"],
    ),
    (
        MODEL.replace("}", ", dtype: bfloat16}") + DATA + "training: {precision: fp16}\n",
        "3:12 training.precision",
        ["bfloat16"],
    ),
    (HUB + "data: {train: trian.jsonl}\n", "2:8 data.train", ["no such file", "did you mean train.jsonl?"]),
    (HUB + "data: {train: ./nothing}\n", "2:8 data.train", ["no such file: ./nothing", "paths start at"]),
    (HUB + "data: {train: /dev/null}\n", "2:8 data.train", ["not a regular file"]),
    (HUB + "data: {train: org/set, eval: x.csv}\n", "2:24 data.eval", ["no such file: x.csv"]),
    (HUB + "data: {train: forge:nothing}\n", "2:8 data.train", ["ships no data", "known: forge:preference/heldout"]),
    ("model: {name: ./nothing}\n" + DATA, "1:9 model.name", ["no model folder"]),
    ("model: {name: ~nobody-here/x}\n" + DATA, "1:9 model.name", ["is not a folder name"]),
    (HUB + "data: {train: ~nobody-here/x}\n", "2:8 data.train", ["is not a file name"]),
    (HUB + f"data: {{train: {'x' * 5000}.csv}}\n", "2:8 data.train", ["is not a file name"]),
    ("model: {name: nothing}\n" + DATA, "1:9 model.name", ["no known model"]),
]


@pytest.mark.parametrize(("text", "place", "words"), CLASHES, ids=[clash[2][0] for clash in CLASHES])
def test_clash_is_one_located_problem(problems_of, tmp_path, text, place, words):
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "folder").mkdir()
    problems = problems_of(text)
    assert len(problems) == 1, "\n".join(map(str, problems))
    line_column, _, path = place.partition(" ")
    assert problems[0].where == f"run.yaml:{line_column}", problems[0]
    assert problems[0].path == path
    assert all(word in str(problems[0]) for word in words), problems[0]
    assert problems[0].fix


def test_there_are_rules():
    assert len(RULES) >= 13 and len(CLASHES) > 50


FINE = [
    "",
    "preset: qlora\n",
    "preset: qlora\nquantization: {bits: 8}\n",
    "training: {max_steps: 3}\n",
    "lora: {}\nfreeze: {first: 50%}\n",
    "lora: {modules_to_save: [embed_tokens]}\nfreeze: {first: 1, embeddings: false}\n",
    "freeze: {embeddings: true}\n",
    'freeze: {patterns: ["*.mlp.*", lm_head, model.norm, "model.layers.[01]"]}\n',
    'lora: {}\nfreeze: {patterns: ["*.lora_A.*"]}\n',
    "freeze: {first: 1, embeddings: false}\n",
    "lora: {init_lora_weights: orthogonal, r: 8, use_dora: true}\n",
    "model: {name: forge-tiny, dtype: float16}\nlora: {}\ntraining: {precision: fp16}\n",
    "model: {name: forge-tiny, dtype: bfloat16}\n",
    "report: {samples: 0, prompts: [hello]}\n",
    "training: {warmup_steps: 1}\n",
    "training: {lr_scheduler_type: constant}\n",
    "ema: {update_after_step: 3}\ntraining: {max_steps: 5}\n",
]


@pytest.mark.parametrize("text", FINE)
def test_no_false_alarm(write, text):
    model = "" if "model:" in text else MODEL
    assert resolve_plan(write(model + DATA + text)).digest


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (
            "training: {num_train_epochs: 2, warmup_steps: 0.1}\nlogging: {logging_steps: 50}\n",
            ["training.max_steps=3"],
        ),
        ("checkpoint: {save_steps: 50}\n", ["training.max_steps=3"]),
        ("lora: {}\nquantization: {bnb_4bit_quant_type: fp4}\n", ["quantization.bits=8"]),
        ("training: {warmup_steps: 5}\n", ["training.lr_scheduler_type=constant"]),
    ],
)
def test_a_stronger_layer_may_make_a_setting_pointless(write, text, overrides):
    assert resolve_plan(write(MODEL + DATA + text), overrides).digest


def test_switching_evaluation_off_for_a_trial_is_fine(write):
    assert resolve_plan(write(MODEL + EVAL + "evaluation: {eval_steps: 5}\n"), ["data.eval=null"]).digest


def test_a_pointless_override_is_an_error(problems_of):
    problems = problems_of(MODEL + DATA, "evaluation.eval_steps=5")
    assert [(one.where, one.path) for one in problems] == [("--set", "evaluation.eval_steps")]


def test_a_missing_preset_does_not_cause_more_problems(problems_of):
    assert len(problems_of(MODEL + DATA + "preset: qlroa\nquantization: {bits: 4}\nfreeze: {first: 1}\n")) == 1
    assert len(problems_of("extends: nothing\n")) == 1


def test_an_unusable_setting_is_not_judged_again(problems_of):
    problems = problems_of(MODEL + DATA + "training: {max_steps: abc, warmup_steps: 50}\nlora: yes\nquantization: {}\n")
    assert [one.path for one in problems] == ["training.max_steps", "lora"]


def test_what_is_missing_is_named(problems_of):
    problems = problems_of("seed: 1\n")
    assert [(one.where, one.path, one.what) for one in problems] == [
        ("run.yaml", "model.name", "is missing"),
        ("run.yaml", "data.train", "is missing"),
    ]
    assert problems_of("model: {revision: x}\n" + DATA)[0].where == "run.yaml:1:1"
