"""The data commands: the first stage of a run alone, without torch and without a run folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.data.formats import read_example
from forge_cli.data.prepare import Say, TokenSet, prepare_tokens
from forge_cli.data.scan import read_again, scan_rows
from forge_cli.errors import DataError, MachineError
from forge_cli.parts.rendering import Renderer
from forge_cli.parts.turn_check import check_turn
from forge_cli.parts.turns import BREAK, RowError
from forge_cli.schema.data import list_sources
from forge_cli.schema.runspec import RunSpec

SHOWN_DIFFERENCES = 3


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """Lets transformers load tokenizers without torch, which costs 3 s and 260 MB that looking at data does not need.

    Only for a process that ends with the command: transformers remembers that there is no torch.
    """
    if "transformers" in sys.modules:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else real(name, package)
    try:
        import transformers

        transformers.is_torch_available()
        yield
    finally:
        importlib.util.find_spec = real


def check_data(spec: RunSpec, say: Say) -> tuple[TokenSet, object]:
    """Prepares the rows of a run; returns their tokens and the tokenizer.

    Raises:
        DataError: Rows cannot be used.
    """
    tokenizer = load_tokenizer(spec)
    # A stream is looked at whole: to check it is to read it.
    data = spec.data.model_copy(update={"streaming": False})
    return prepare_tokens(spec.model_copy(update={"data": data}), tokenizer, say), tokenizer


def compare_with_template(run: Path, tokens: TokenSet, spec: RunSpec) -> dict[str, object]:
    """Compares what was trained with what the saved tokenizer and its chat template write.

    Args:
        run: Run folder.
        tokens: The rows of the run.
        spec: Its run file.

    Returns:
        ``compared`` and ``equal`` (conversations), ``weights`` (the folder) and ``different``: the first of them, each
        with ``place`` and what stands around the first difference.

    Raises:
        MachineError: The run saved no weights.
        DataError: Its rows are no conversations, or the saved template refuses one.
    """
    from transformers import AutoTokenizer

    weights = next((run / name for name in ("adapter", "model") if (run / name / "tokenizer.json").is_file()), None)
    if weights is None:
        raise MachineError("the run has no adapter and no model", where=str(run))
    saved = AutoTokenizer.from_pretrained(str(weights), trust_remote_code=False)
    renderer = Renderer(saved)
    scan = scan_rows("train", list_sources(spec.data.train), spec.data, spec.method)
    trained = _iterate_trained(tokens.folder / "train.arrow")
    number, ids = next(trained)
    result: dict[str, object] = {"compared": 0, "equal": 0, "weights": str(weights), "different": []}
    for _, place, values in read_again(scan):
        if place != number or ids is None:
            continue
        example = read_example(values, scan.kind, bool(saved.chat_template))
        if isinstance(example.prompt, str):
            raise DataError("the rows are no conversations, so no chat template writes them", where=str(run))
        chat = [*example.prompt, *example.answers[0]]
        try:
            row = renderer.render_messages(chat, train_on="all", tools=example.tools, template_options=example.options)
        except RowError as error:
            raise DataError(str(error), where=tokens.name_row("train", number)) from error
        plain = [
            {k: v for k, v in turn.items() if (v is not None or k == "content") and k != "weight"} for turn in chat
        ]
        for index, turn in enumerate(plain, 1):
            check_turn(turn, index)  # servers too read a call's arguments before a template writes them
        served = saved.apply_chat_template(plain, tools=example.tools, tokenize=False, **example.options)
        ours = next(renderer.tokenize([row])).input_ids
        result["compared"] += 1
        if row.text.replace(BREAK, "") == served and ours[: len(ids)] == ids:
            result["equal"] += 1
        elif len(result["different"]) < SHOWN_DIFFERENCES:
            shown = _show_difference(saved.decode(ids), served)
            result["different"].append({"place": tokens.name_row("train", number), **shown})
        while number == place and ids is not None:
            number, ids = next(trained, (0, None))
    return result


def _iterate_trained(path: Path) -> Iterator[tuple[int, list[int]]]:
    """Yields number and token ids of every trained row; of a pair, those of the better answer."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            for row in batch.to_pylist():
                answer = row.get("chosen_ids") or row.get("completion_ids") or []
                yield row["row"], row.get("input_ids") or row["prompt_ids"] + answer


def _show_difference(trained: str, served: str) -> dict[str, str]:
    first = next(
        (i for i, (a, b) in enumerate(zip(trained, served, strict=False)) if a != b), min(len(trained), len(served))
    )
    start = max(0, first - 20)
    return {"trained": trained[start : first + 40], "served": served[start : first + 40]}
