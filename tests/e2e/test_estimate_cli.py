"""`forge estimate` as a user types it, and the same question before `forge train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from forge_cli.cli.app import run_app
from forge_cli.units import GIB

RUN_FILE = """
preset: lora
model: {name: mistral-7b}
data: {train: "forge:quickstart/train"}
"""


@pytest.fixture()
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(RUN_FILE, encoding="utf-8")
    return file


class Answer(NamedTuple):
    returncode: int
    stdout: str
    stderr: str

    def json(self):
        assert self.returncode == 0, self.stderr
        return json.loads(self.stdout)


@pytest.fixture()
def here(capsys, monkeypatch):
    """Types a command in this process, without a GPU: a process of its own takes most of a second."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def type_command(*arguments: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_app([str(one) for one in arguments])
        return Answer(ended.value.code, *capsys.readouterr())

    return type_command


def forge(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "forge_cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env={**os.environ, **environment}
    )


def ask(*arguments: object, **environment: str) -> object:
    done = forge("estimate", *arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_table_of_methods_is_ordered_as_everybody_expects():
    rows = {(row["method"], row["activation_checkpointing"]): row for row in ask("--model", "mistral-7b")}
    assert len(rows) == 6
    for checkpointing in (True, False):
        sizes = [rows[method, checkpointing]["allocated_bytes"] for method in ("full", "LoRA", "QLoRA")]
        assert sizes == sorted(sizes, reverse=True)
    for method in ("full", "LoRA", "QLoRA"):
        assert rows[method, True]["allocated_bytes"] < rows[method, False]["allocated_bytes"]
    # Weights in 16 bit alone are 13.5 GiB, in 4 bit 3.8.
    assert 14 * GIB < rows["LoRA", True]["allocated_bytes"] < 20 * GIB
    assert 4 * GIB < rows["QLoRA", True]["allocated_bytes"] < 10 * GIB
    printed = forge("estimate", "--model", "mistral-7b").stdout
    assert "QLoRA" in printed and "smallest GPUs" in printed


def test_parts_instants_verdict_and_advice(run_file):
    found = ask(run_file, "--gpu", "t4")
    assert found["device"]["verdict"] == "too big"
    peak = found["instants"][found["peak"]]
    assert peak["total"] == found["allocated_bytes"] == sum(v for k, v in peak.items() if k != "total")
    assert set(found["formulas"]) == set(peak) - {"total"}
    assert all(one["source"] and one["formula"] and one["settings"] for one in found["formulas"].values())
    assert found["advice"] and found["time"]["step_seconds"] == sorted(found["time"]["step_seconds"])
    for advice in found["advice"]:
        # Every line of advice, typed, leads to what it says.
        typed = [part for text in advice["set"] for part in ("--set", text)]
        again = ask(run_file, "--gpu", "t4", *typed)
        assert again["device"]["verdict"] == advice["verdict"] == "fits"
        assert again["device"]["needed_bytes"] == advice["needed_bytes"]
    shown = forge("estimate", run_file, "--gpu", "t4", "--explain").stdout
    assert "too big by" in shown and "Source:" in shown and "--set" in shown and "GiB" in shown


@pytest.mark.parametrize(
    ("what", "path"),
    [("batch", "training.per_device_train_batch_size"), ("length", "data.max_length"), ("rank", "lora.r")],
)
def test_the_largest_fits_and_one_more_does_not(run_file, what, path):
    found = ask(run_file, "--memory", "24GiB", "--max", what)
    assert found["path"] == path and found["verdict"] == "fits"
    step = 64 if what == "length" else 1
    more = ask(run_file, "--memory", "24GiB", "--set", f"{path}={found['value'] + step}")
    assert more["device"]["verdict"] != "fits"
    same = ask(run_file, "--memory", "24GiB", "--set", f"{path}={found['value']}")
    assert same["device"]["needed_bytes"] == found["needed_bytes"]


def test_sweep_fits_and_sharding(run_file):
    rows = ask(run_file, "--sweep", "data.max_length=512,1024", "--sweep", "training.per_device_train_batch_size=1,2")
    assert [(row["data.max_length"], row["training.per_device_train_batch_size"]) for row in rows] == [
        ("512", "1"), ("512", "2"), ("1024", "1"), ("1024", "2"),
    ]  # fmt: skip
    sizes = [row["allocated_bytes"] for row in rows]
    assert sizes[0] < sizes[1] < sizes[3] and sizes[0] < sizes[2] < sizes[3]
    fits = {row["gpu"]: row["verdict"] for row in ask(run_file, "--fits")}
    assert fits["t4"] == "too big" and fits["h100-sxm"] == "fits" and len(fits) > 30
    whole = ask(run_file)["allocated_bytes"]
    eighth = ask(run_file, "--sharding", "fsdp2:8")
    assert eighth["allocated_bytes"] < whole / 2
    assert eighth["instants"]["load"]["weights"] == -(-ask(run_file)["instants"]["load"]["weights"] // 8)


def test_a_picture_is_drawn(run_file, tmp_path):
    picture = tmp_path / "memory.png"
    assert forge("estimate", run_file, "--plot", picture, "--gpu", "l4").returncode == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 10_000


def test_time_and_money_follow_tokens_and_price(run_file):
    one = ask(run_file, "--gpu", "a100", "--tokens", 10**8, "--price", "2/h")["time"]
    two = ask(run_file, "--gpu", "a100", "--tokens", 2 * 10**8, "--price", "2/h")["time"]
    assert two["cost"][1] == pytest.approx(2 * one["cost"][1], rel=0.01)
    assert one["cost"][1] == pytest.approx(2 * one["run_seconds"][1] / 3600)
    assert (
        ask(run_file, "--gpu", "h100")["time"]["tokens_per_second"]
        > ask(run_file, "--gpu", "t4")["time"]["tokens_per_second"]
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "mistral-7b", "--gpu", "rtx4091"], 2, "rtx-4090"),
        (["--model", "mistral-7b", "--gpu", "t4", "--memory", "8GiB"], 2, "one of them"),
        (["--model", "mistral-7b", "--memory", "16"], 2, "16GiB"),
        (["--model", "mistral-7b", "--max", "rows", "--gpu", "t4"], 2, "--max batch"),
        (["--model", "mistral-7b", "--sweep", "data.max_lenght=1"], 2, "max_length"),
        (["--model", "mistral-7b", "--sharding", "fsdp"], 2, "fsdp2:8"),
        (["--model", "mistral-7b", "--gpu", "t4", "--price", "much", "--explain"], 2, "2.50/h"),
        (["--model", "mistral-7b", "--gpu", "a100", "--price", "x2/h", "--explain"], 2, "2.50/h"),
        (["--model", "org/unheard-of"], 4, "config.json"),
        (["--model", "org/unheard-of", "--sweep", "data.max_length=512,1024"], 4, "config.json"),
        (["--model", "org/unheard-of", "--plot", "x.png"], 4, "config.json"),
        (["--model", "mistral-7b", "--memory", "1GiB", "--max", "batch"], 5, "not even the smallest"),
        ([], 2, "--model"),
    ],
)
def test_wrong_input_is_one_line_with_what_to_type(here, arguments, code, words):
    done = here("estimate", *arguments)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "both"),
    [
        ("--max batch --price 2/h", ("--max", "--price")),
        ("--max batch --fits", ("--max", "--fits")),
        ("--fits --gpu t4", ("--fits", "--gpu")),
        ("--sweep lora.r=8,16 --tokens 5", ("--sweep", "--tokens")),
        ("--sweep lora.r=8 --sweep lora.r=16", ("--sweep", "twice")),
        ("--plot x.png --json", ("--plot", "--json")),
        ("--trace --sharding ddp:2", ("--trace", "--sharding")),
        ("--calibrate --explain", ("--calibrate", "--explain")),
        ("--memory 16GiB --price 2/h", ("--price", "--memory")),
        ("--gpu t4 --sharding ddp:2 --tokens 5", ("--tokens", "--sharding")),
        ("--gpu t4 --data --tokens 5", ("--data", "--tokens")),
        ("--tokens 5", ("GPU", "--gpu")),
        ("--sharding many --gpu t4 --max batch", ("--sharding", "fsdp2:8")),
        ("--sharding many --fits", ("--sharding", "fsdp2:8")),
    ],
)
def test_an_option_that_would_be_ignored_is_an_error(here, run_file, arguments, both):
    done = here("estimate", run_file, *arguments.split())
    assert done.returncode == 2 and done.stdout == "" and all(one in done.stderr for one in both)


@pytest.mark.parametrize(
    "override",
    [
        "preset=lora",
        "method=sft",
        "extends=qlora-7b",
        "lora=null",
        "quantization.bits=8",
        "training.activation_checkpointing=true",
    ],
)
def test_the_table_refuses_what_it_varies(here, override):
    done = here("estimate", "--model", "mistral-7b", "--set", override)
    assert done.returncode == 2 and "the table of methods varies it" in done.stderr


def test_settings_of_adapters_leave_the_full_row_full(here):
    typed = ["estimate", "--model", "mistral-7b", "--json"]
    bare, ranks, codes = (
        [row["allocated_bytes"] for row in here(*typed, *more).json()]
        for more in ((), ("--set", "lora.r=64"), ("--set", "quantization.bnb_4bit_use_double_quant=false"))
    )
    assert ranks[:2] == bare[:2] and all(more > less for more, less in zip(ranks[2:], bare[2:], strict=True))
    assert codes[:4] == bare[:4] and all(more > less for more, less in zip(codes[4:], bare[4:], strict=True))


def test_every_question_is_about_one_rank_if_the_run_is_spread(here, run_file):
    spread = ("--sharding", "fsdp2:8", "--json")
    alone = here("estimate", run_file, *spread).json()
    assert alone["time"] is None
    fits = here("estimate", run_file, "--fits", *spread).json()
    rows = here("estimate", run_file, "--sweep", "data.max_length=2048", *spread).json()
    assert fits[0]["allocated_bytes"] == rows[0]["allocated_bytes"] == alone["allocated_bytes"]
    most = [here("estimate", run_file, "--memory", "24GiB", "--max", "batch", *more).json()["value"] for more in (
        ("--json",), spread,
    )]  # fmt: skip
    assert most[0] < most[1]
    tight = here("estimate", run_file, "--memory", "8GiB", *spread).json()
    for advice in tight["advice"]:
        options = [part for text in advice["set"] for part in ("--set", text)]
        again = here("estimate", run_file, "--memory", "8GiB", *options, *spread).json()
        assert again["device"]["needed_bytes"] == advice["needed_bytes"]
    assert "no time" in here("estimate", run_file, "--gpu", "a100", *spread[:2]).stdout


def test_rows_that_are_not_there_yet_are_no_obstacle(here, tmp_path):
    file = tmp_path / "run.yaml"
    there = RUN_FILE.replace("forge:quickstart/train", "data/train.jsonl")
    file.write_text(there)
    done = here("estimate", file, "--json")
    assert done.returncode == 0 and done.stderr.count("data.train is not there yet") == 1
    assert done.json()["digest"] is None
    refused = here("estimate", file, "--gpu", "a100", "--data")
    assert refused.returncode == 2 and "no such file" in refused.stderr
    file.write_text(there + "training: {learning_rat: 1}\n")
    refused = here("estimate", file)
    assert refused.returncode == 2 and "learning_rate" in refused.stderr


def test_the_default_length_is_one_that_the_model_knows(here, tmp_path):
    assert len(here("estimate", "--model", "gpt2", "--json").json()) == 6
    assert "4 x 512 tokens" in here("estimate", "--model", "forge-tiny").stdout
    picture = tmp_path / "memory.png"
    assert here("estimate", "--model", "gpt2", "--plot", picture).returncode == 0 and picture.is_file()


@pytest.mark.parametrize("gpu", ["t4", "v100"])
def test_a_gpu_that_cannot_compute_the_run_is_refused(here, run_file, gpu):
    for override, words in [
        ("training.precision=bf16", "training.precision: fp16 or auto"),
        ("model.attn_implementation=flash_attention_2", "Ampere"),
    ]:
        done = here("estimate", run_file, "--gpu", gpu, "--set", override)
        assert done.returncode == 2 and words in done.stderr
        verdicts = {
            one["gpu"]: one["verdict"]
            for one in here("estimate", run_file, "--fits", "--set", override, "--json").json()
        }
        assert verdicts["t4"].startswith("no ") and verdicts["h100-sxm"] == "fits"


def test_values_with_brackets_are_one_value(here, run_file):
    rows = here("estimate", run_file, "--sweep", "lora.target_modules=[q_proj,v_proj],[q_proj]", "--json").json()
    assert [row["lora.target_modules"] for row in rows] == ["[q_proj,v_proj]", "[q_proj]"]
    assert rows[0]["allocated_bytes"] > rows[1]["allocated_bytes"]


def test_explanations_are_about_the_instant_of_the_peak(here, run_file):
    evaluation = ("--set", "data.eval_fraction=0.1", "--set", "evaluation.per_device_eval_batch_size=64")
    found = here("estimate", run_file, *evaluation, "--json").json()
    assert found["peak"] == "evaluation"
    cause = found["formulas"]["activations"]
    assert "per_device_eval_batch_size" in cause["settings"] and f"{64 * 2048} tokens" in cause["formula"]


def test_layers_in_8_bit_keep_their_inputs(here):
    override = ("--set", "quantization.bits=8")
    found = here("estimate", "--model", "mistral-7b", "--explain", *override, "--json").json()["formulas"]
    assert "8 bit keep their inputs" in found["activations"]["formula"] and "1.001 bytes" in found["weights"]["formula"]


def test_a_duration_says_what_it_takes_for_granted(here, run_file):
    typed = ("estimate", run_file, "--gpu", "a100", "--tokens", "1000000")
    assert "assuming every sequence is full" in here(*typed).stdout
    assert "assuming every sequence is full" in here(*typed, "--json").json()["time"]["assumed"][-1]
    assert "assuming" not in here(*typed, "--set", "data.packing=true").stdout


def test_experts_are_said_to_stay_as_they_are(here):
    assert "bitsandbytes packs 3 % of this model's weights" in here("estimate", "--model", "mixtral-8x7b").stdout


@pytest.fixture()
def driver(tmp_path: Path) -> str:
    """A driver's tool that knows one RTX 3060, first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288'\n")
    tool.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_training_stops_before_anything_is_loaded_if_the_gpu_is_too_small(run_file, tmp_path, driver):
    done = forge("train", run_file, cwd=tmp_path, PATH=driver)
    assert done.returncode == 5
    assert (
        "does not fit the GPU" in done.stderr
        and "rtx-3060" in done.stderr
        and "--set quantization.bits=4" in done.stderr
    )
    assert "loading torch" not in done.stderr and not (tmp_path / "runs").exists()
    visible = ask(run_file, PATH=driver)
    assert visible["device"]["gpu"] == "rtx-3060" and visible["device"]["verdict"] == "too big"


def test_calibration_takes_two_constants_from_reports(run_file, tmp_path):
    for index, (allocated, reserved, device) in enumerate([(10, 11, 12), (20, 22, 22.5), (10, 10.5, 11)]):
        folder = tmp_path / "runs" / str(index)
        folder.mkdir(parents=True)
        memory = {
            "gpu": "NVIDIA GeForce RTX 4090",
            "allocated_bytes": allocated * GIB,
            "reserved_bytes": reserved * GIB,
            "device_bytes": device * GIB,
            "total_bytes": 23.5 * GIB,
        }
        (folder / "report.json").write_text(json.dumps({"memory": memory}))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "report.json").write_text("{")
    found = ask("--calibrate", tmp_path / "runs", FORGE_CACHE=str(tmp_path / "cache"))
    # Medians: 10, 10 and 5 % reserved beyond allocated; 1, 0.5 and 0.5 GiB beyond reserved.
    assert found["rtx-4090"] == {"runs": 3, "context_bytes": GIB // 2, "reserve_ratio": pytest.approx(0.1)}
    with_it = ask(run_file, "--gpu", "4090", FORGE_CACHE=str(tmp_path / "cache"))
    assert with_it["device"]["reserved_bytes"] == round(1.1 * with_it["allocated_bytes"])
    assert with_it["device"]["needed_bytes"] == with_it["device"]["reserved_bytes"] + GIB // 2
    fits = {one["gpu"]: one for one in ask(run_file, "--fits", FORGE_CACHE=str(tmp_path / "cache"))}
    assert fits["rtx-4090"]["needed_bytes"] == with_it["device"]["needed_bytes"]
