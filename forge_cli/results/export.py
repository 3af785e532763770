"""Exports a run as a GGUF file, reads the file back, and compares its prompts and greedy tokens with the model's."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from forge_cli.build.compute import choose_compute
from forge_cli.errors import ConfigError, MachineError, ModelError
from forge_cli.redaction import printable
from forge_cli.results.card import write_card
from forge_cli.results.find import Run
from forge_cli.results.merge import find_merged, merge_run, release_memory
from forge_cli.results.merge_texts import FEWEST_TEXTS, collect_texts, read_logits
from forge_cli.run.folder import write_atomic

CONVERTER = "convert_hf_to_gguf.py"
_NEW_TOKENS = 24
# Half the distance between neighbouring numbers, relative; q8_0 has 127 steps to the largest of a block.
_ROUNDINGS = {"f32": 2**-24, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254}
_EXACT = ("f32", "f16")
_MARK = "# Written by forge export."


def export_run(
    run: Run,
    form: str,
    output: Path | None = None,
    *,
    converter: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, object]:
    """Writes a GGUF file and a Modelfile beside it, after the file has been read back and compared.

    Args:
        run: The run; an adapter is merged first if it is not yet.
        form: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        output: File; default ``gguf/NAME-FORM.gguf`` inside the run.
        converter: llama.cpp's converter or the folder it is in; ``None`` writes the file without it.
        say: Receives what is being done.

    Returns:
        What was measured, as plain data; ``file`` is where it lies.

    Raises:
        ModelError: The family needs the converter, or the file does not answer like the model. No file stays.
        MachineError: The gguf package is missing, or the file's name is taken by something else.
        ConfigError: There is no such converter.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MachineError("GGUF files need the gguf package, which is not installed", fix='pip install "gguf>=0.17"')
    if run.plan.spec.method == "reward":
        raise ModelError("a reward model scores answers and writes none", where=str(run.path), fix="name another run")
    program = find_converter(converter)
    file = output or run.path / "gguf" / f"{run.path.name}-{form}.gguf"
    _refuse_foreign(file)
    source = run.weights() if run.kind == "model" else find_merged(run)
    if source is None:
        source = Path(str(merge_run(run, say=say)["folder"]))
    asking = run.asking()
    aside = file.parent / f".{file.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        written = aside / file.name
        say(f"writing {form} {f'with {program[-1]} ' if program else ''}...")
        if program:
            _convert(program, source, written, form)
        else:
            from forge_cli.results.gguf_file import write_gguf

            ends = [int(one) for one in asking.get("end_token_ids") or []]
            write_gguf(source, written, form, name=run.path.name, end_token_ids=ends)
        say("reading the file back and comparing it ...")
        checked = check_gguf(run, source, written, form)
        with written.open("rb") as done:
            os.fsync(done.fileno())
        result = {"run": run.path.name, "format": form, "bytes": written.stat().st_size, "file_name": file.name}
        written.replace(file)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    result |= checked
    note = _write_modelfile(file, asking)
    if output is None:  # another folder may have a README of its own
        write_card(file.parent, run, gguf=result)
    return {"file": str(file), "modelfile": note, "converter": program[-1] if program else None, **result}


def find_converter(given: Path | None) -> list[str] | None:
    """Returns how llama.cpp's converter is called; ``None`` if none is named.

    Raises:
        ConfigError: There is none.
    """
    if given is None:
        return None
    place = given.expanduser()
    place = place / CONVERTER if place.is_dir() else place
    if not place.is_file():
        raise ConfigError(
            f"there is no {CONVERTER} here",
            where=f"--converter or LLAMA_CPP_DIR: {given}",
            fix=f"name llama.cpp's folder or its {CONVERTER}",
        )
    return [sys.executable, str(place)] if place.suffix == ".py" else [str(place)]


def check_gguf(run: Run, source: Path, file: Path, form: str) -> dict[str, object]:
    """Reads a GGUF file with transformers and compares it with the model that it was made from.

    Token ids of rendered prompts must be equal. Of the tokens that the model would write greedily, f32 and f16 must
    give the same, save where the model's two best lie closer together than the format's rounding; for coarser formats
    the share is measured, and under half is refused.

    Returns:
        ``checked``, and counts; with ``checked`` False the reason in ``not_checked``.

    Raises:
        ModelError: They differ.
    """
    compute = choose_compute(run.plan.spec.model_copy(update={"training": _open_precision(run)}))
    dtype = torch.float32 if compute.device == "cpu" else compute.dtype
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = collect_texts(run, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map={"": compute.device}).eval()
    prompts = texts.prompts[:FEWEST_TEXTS]
    rows = [_continue(model, tokenizer, prompt, run.asking().get("end_token_ids")) for prompt in prompts]
    wanted = read_logits(model, rows)
    del model
    release_memory()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            read = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype, device_map={"": compute.device}
            ).eval()
            read_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, NotImplementedError, KeyError) as error:
        return {"checked": False, "not_checked": printable(str(error).split("\n")[0])[:200]}
    _compare_prompts(run, tokenizer, read_tokenizer, prompts)
    return _compare_greedy(rows, prompts, wanted, read_logits(read, rows), form, dtype)


def _open_precision(run: Run):
    training = run.plan.spec.training
    return training if torch.cuda.is_available() else training.model_copy(update={"precision": "auto"})


@torch.inference_mode()
def _continue(model, tokenizer, prompt: list[int], ends: list[int] | None) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or tokenizer.eos_token_id,
    )
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0].tolist()


def _compare_prompts(run: Run, tokenizer, read, prompts: list[list[int]]) -> None:
    """Compares token ids: of the rows' own prompts as text, and of turns rendered by the file's chat template."""
    pairs = []
    for prompt in prompts:
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        pairs.append([one.encode(text, add_special_tokens=False) for one in (tokenizer, read)])
        if tokenizer.chat_template:
            system = run.asking().get("system_prompt")
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": tokenizer.decode(prompt, skip_special_tokens=True)})
            options = {"add_generation_prompt": True, "return_dict": False}
            pairs.append([list(one.apply_chat_template(turns, **options)) for one in (tokenizer, read)])
    for own, other in pairs:
        if own != other:
            first = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), len(own))
            raise ModelError(
                f"the GGUF file renders a prompt to other tokens, from the {first + 1}. of {len(own)} on",
                where="export",
                why="it would be asked in a form that it was not trained on",
            )


def _compare_greedy(
    rows: list[list[int]],
    prompts: list[list[int]],
    wanted: list[torch.Tensor],
    got: list[torch.Tensor],
    form: str,
    dtype: torch.dtype,
) -> dict[str, object]:
    compared = equal = ties = 0
    apart = 0.0
    rounding = max(_ROUNDINGS[form], torch.finfo(dtype).eps / 2)
    for row, prompt, one, other in zip(rows, prompts, wanted, got, strict=True):
        one, other = (logits[len(prompt) - 1 : len(row) - 1] for logits in (one, other))
        best = one.topk(2).values
        is_equal = one.argmax(-1) == other.argmax(-1)
        is_tie = best[:, 0] - best[:, 1] <= 16 * rounding * one.abs().max()
        compared, equal = compared + len(is_equal), equal + int(is_equal.sum())
        ties += int((~is_equal & is_tie).sum())
        apart = max(apart, (one - other).abs().max().item() if len(is_equal) else 0.0)
    least = compared - ties if form in _EXACT else compared / 2
    if not equal >= least:
        raise ModelError(
            f"{compared - equal} of {compared} greedy tokens of the {form} file are not the model's",
            where="export",
            why=f"its logits differ by up to {apart:.3g}",
            fix="report it with the model's config.json",
        )
    return {
        "checked": True,
        "prompts": len(rows),
        "compared": compared,
        "equal": equal,
        "ties": ties,
        "largest_difference": apart,
    }


def _convert(program: list[str], source: Path, file: Path, form: str) -> None:
    """Runs llama.cpp's converter on the folder, with a chat template that other programs can read."""
    with _with_plain_template(source, file.parent / "model") as folder:
        command = [*program, str(folder), "--outfile", str(file), "--outtype", form]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not file.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"the converter failed (exit {done.returncode})",
            where=program[-1],
            why=printable(said[-1].strip())[:300] if said else "it wrote no file",
            fix="run it by hand on the merged folder, or take a newer llama.cpp",
        )


@contextlib.contextmanager
def _with_plain_template(source: Path, folder: Path) -> Iterator[Path]:
    from forge_cli.results.gguf_file import plain_template

    folder.mkdir()
    for path in source.iterdir():
        if path.name != "README.md":  # a converter copies its tags into the file
            (folder / path.name).symlink_to(path.resolve())
    template = folder / "chat_template.jinja"
    if template.exists():
        text = plain_template(template.read_text(encoding="utf-8"))
        template.unlink()
        template.write_text(text, encoding="utf-8")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _write_modelfile(file: Path, asking: dict) -> str | None:
    """Writes what ``ollama create`` reads; the template comes from the GGUF file. None: another's stands there."""
    path = file.parent / "Modelfile"
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        return None
    stops = [f"PARAMETER stop {_quote(one)}" for one in asking.get("end_tokens", []) if isinstance(one, str)]
    system = asking.get("system_prompt")
    lines = [_MARK, f"FROM ./{file.name}", *stops, *([f'SYSTEM """{system}"""'] if system else [])]
    write_atomic(path, "\n".join(lines) + "\n")
    return str(path)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _refuse_foreign(file: Path) -> None:
    if not file.exists():
        return
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(4) == b"GGUF":
                return
    raise MachineError(
        "this exists and is no GGUF file", where=str(file), why="it would be lost", fix="choose another --output"
    )
