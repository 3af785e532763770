"""What ``forge init`` can see by itself: the rows, how long they are, and the device of this machine."""

from __future__ import annotations

import bisect
import math
import os
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.data.hub import hub_or_copies
from forge_cli.data.outcomes import Limits
from forge_cli.data.row_tokens import RowTokenizer
from forge_cli.data.scan import Scan, find_method, read_again, scan_rows
from forge_cli.errors import ConfigError, DataError, MachineError, ModelError
from forge_cli.estimate.budget import Device
from forge_cli.estimate.devices import choose_device
from forge_cli.facts.model_facts import EMBEDDED_MODEL, locate_model
from forge_cli.parts.rendering import Renderer
from forge_cli.redaction import printable
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.resolve.sources import find_embedded_data
from forge_cli.run.data_stage import torch_hidden
from forge_cli.schema.data import DataSection, Source
from forge_cli.schema.section import MOST_TOKENS

QUICKSTART = "forge:quickstart/train"
# Of a larger set so many rows are tokenised, spread evenly: 99 % of them is then known to a tenth of a per cent or two.
SAMPLE_ROWS = 5000
_BATCH_ROWS = 64
# What a run on the CPU may take of the computer's memory; the rest is the system's.
_CPU_SHARE = 0.8


class Rows(NamedTuple):
    """The rows of a source.

    Attributes:
        path: As it stands in the run file.
        held_out: Rows that ship beside them for evaluation; ``None`` without.
        method: Training method that takes their format.
        scan: What reading them all found.
    """

    path: str
    held_out: str | None
    method: str
    scan: Scan

    @property
    def count(self) -> int:
        """Rows that can be used."""
        return sum(self.scan.counts)


class Lengths(NamedTuple):
    """How long rows are.

    Attributes:
        tokens: Length of each measured row, ascending.
        num_rows: Rows there are; more than were measured of a large set.
        guessed: Why they are characters / 4 rather than tokens; empty if they are tokens.
        bad: The first row that the chat template refuses; empty if none was.
        num_bad: Measured rows that it refuses.
    """

    tokens: list[int]
    num_rows: int
    guessed: str = ""
    bad: str = ""
    num_bad: int = 0

    def percentile(self, percent: float) -> int:
        """Returns the smallest length that so many per cent of the rows do not exceed."""
        return self.tokens[max(0, math.ceil(percent / 100 * len(self.tokens)) - 1)]

    def count_longer(self, length: int) -> int:
        """Returns how many measured rows are longer."""
        return len(self.tokens) - bisect.bisect_right(self.tokens, length)

    @property
    def is_sample(self) -> bool:
        """Not every row was measured."""
        return len(self.tokens) + self.num_bad < self.num_rows


class Target(NamedTuple):
    """What a run has to fit into.

    Attributes:
        device: The GPU, or the memory of this computer.
        is_gpu: It is a GPU.
    """

    device: Device
    is_gpu: bool


def look_at_target(gpu: str | None) -> Target:
    """Returns the GPU that is named (``cpu`` and sizes such as ``24GiB`` too), the visible one, or this computer.

    Raises:
        ConfigError: There is no such GPU.
    """
    device = None
    if gpu is None or gpu.casefold() != "cpu":
        is_size = gpu is not None and re.match(r"\s*\d+(\.\d+)?\s*[kmgtKMGT]i?[bB]?\s*$", gpu)
        try:
            if is_size:
                return Target(choose_device(None, gpu)._replace(name=f"a GPU of {gpu.strip()}"), True)
            device = choose_device(gpu, None)
        except ConfigError as error:
            (problem,) = error.problems
            fix = problem.fix.replace("--memory", "--gpu")
            raise ConfigError(problem.what, where="--gpu", why=problem.why, fix=fix) from None
    if device is not None:
        return Target(device, True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target(Device("this computer", round(_CPU_SHARE * memory), 0, 0.0), False)


def look_at_rows(path: str, preset: str | None = None) -> Rows:
    """Reads all rows of a source and tells format and number.

    At most 1 % of them may be unreadable; the run file then says that they are skipped.

    Args:
        path: What ``data.train`` will say.
        preset: Its method has to take the rows; without one the rows decide which method it is.

    Raises:
        DataError: There are none, or they cannot be used; says which and why.
    """
    method = find_method(path)
    if preset is not None:
        stand_ins = {"model": {"name": EMBEDDED_MODEL}, "data": {"train": QUICKSTART, "max_length": 128}}
        method = resolve_mapping({"preset": preset, **stand_ins}).spec.method
    data = DataSection(train=path, on_bad_row="skip")
    scan = scan_rows("train", [Source(path=path)], data, method)
    name = re.sub(r"(train|rated)$", lambda end: {"train": "heldout"}.get(end[0], f"{end[0]}-heldout"), path)
    return Rows(path, name if name != path and find_embedded_data(name) else None, method, scan)


def measure_rows(rows: Rows, model: str) -> Lengths:
    """Measures the rows with the tokenizer of a model; without it, in characters / 4.

    Raises:
        DataError: The model's chat template refuses more than 1 % of the rows.
        ModelError: The model's folder holds no tokenizer that can be used.
        ConfigError: There is no such model.
    """
    spec = resolve_mapping({"model": {"name": model}, "data": {"train": QUICKSTART, "max_length": 8}}).spec
    step = -(-rows.count // SAMPLE_ROWS)
    sample = (values for at, values in enumerate(read_again(rows.scan)) if at % step == 0)
    try:
        with torch_hidden(), hub_or_copies(spec, lambda text: None):
            tokenizer = load_tokenizer(spec)
    except (MachineError, ModelError) as error:
        if Path(locate_model(model)).exists():
            raise
        reason = error.problems[0].what
        return Lengths(sorted(_guess(values) for _, _, values in sample), rows.count, guessed=printable(reason))
    tokenize = RowTokenizer(Renderer(tokenizer), Limits(rows.scan.kind, "assistant", MOST_TOKENS, "drop")).tokenize
    lengths, bad, num_bad = [], "", 0
    wanted = ((number, values, False) for _, number, values in sample)
    while batch := list(islice(wanted, _BATCH_ROWS)):
        for outcome in tokenize(batch):
            if outcome.status == "bad":
                num_bad += 1
                bad = bad or f"{rows.scan.describe(outcome.number)}: {outcome.what}"
            else:
                lengths.append(outcome.length)
    if num_bad > 0.01 * (len(lengths) + num_bad):
        place, _, what = bad.partition(": ")
        raise DataError(
            f"{what} ({num_bad} of {len(lengths) + num_bad} rows)",
            where=place,
            why=f"{model} cannot be asked in this form",
            fix="use a model with a chat template (its name often ends in -Instruct), or other rows",
        )
    return Lengths(sorted(lengths), rows.count, bad=bad, num_bad=num_bad)


def _guess(values: Mapping[str, object]) -> int:
    """Guesses the tokens of a row; of a pair, those of the longer answer."""
    if isinstance(ids := values.get("input_ids"), (list, tuple)):
        return len(ids)
    shorter = min((_count_characters(values[one]) for one in ("chosen", "rejected") if one in values), default=0)
    return max(1, (_count_characters(values) - shorter) // 4)


def _count_characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_count_characters, value.values()))
    return sum(map(_count_characters, value)) if isinstance(value, (list, tuple)) else 0
