"""ORPO and CPO (with SimPO) from ``trl.experimental``, which may change or go with any release of TRL."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch

from forge_cli.backend.arguments import describe_versions
from forge_cli.backend.preference import PreferenceTrainer
from forge_cli.backend.watching import WeightedMeans
from forge_cli.errors import MachineError
from forge_cli.parts.labels import IGNORED

METHODS = ("orpo", "cpo")


class ExperimentalTrainer(PreferenceTrainer):
    """What ORPO and CPO share: TRL gets one row to prepare, as the others would be rewritten, and then all of them."""

    def __init__(self, *args, train_dataset, eval_dataset=None, **kwargs) -> None:
        one = eval_dataset.select([0]) if eval_dataset is not None else None
        super().__init__(*args, train_dataset=train_dataset.select([0]), eval_dataset=one, **kwargs)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset

    def tokenize_row(self, feature, model=None) -> dict:
        """Leaves a row alone; Forge tokenised it."""
        return feature

    def reshape_rows(self, examples: list[dict]) -> list[dict]:
        """Joins prompt and answer, with labels on the answer, as these trainers' collator takes them."""
        rows = []
        for one in examples:
            row = {}
            for side in ("chosen", "rejected"):
                ids = one["prompt_ids"] + one[f"{side}_ids"]
                row[f"{side}_input_ids"], row[f"{side}_attention_mask"] = ids, [1] * len(ids)
                row[f"{side}_labels"] = [IGNORED] * len(one["prompt_ids"]) + one[f"{side}_ids"]
            rows.append(row)
        return rows

    def count_answers(self, inputs: dict) -> tuple[int, int]:
        """Counts the pairs of a batch."""
        return (inputs["chosen_input_ids"].shape[0],) * 2

    def find_joining(self) -> str:
        """The plain loss is a mean over the tokens of a batch, the rest one over its pairs."""
        has_plain = self._name == "ORPO" or self.cpo_alpha
        return "its plain loss is a mean over tokens, the rest over pairs" if has_plain else super().find_joining()

    def weigh_loss(self, loss: torch.Tensor, inputs: dict) -> WeightedMeans:
        """The loss is a mean over pairs, and a plain loss that is a mean over tokens."""
        [(loss, pairs)] = super().weigh_loss(loss, inputs)
        if self._name == "ORPO":  # its plain loss is over the prompt as well
            weight, counted = 1.0, inputs["chosen_attention_mask"] != 0
        else:
            weight, counted = self.cpo_alpha, inputs["chosen_labels"] != IGNORED
        plain = loss.new_tensor(weight * self._stored_metrics["eval"]["eval_nll_loss"][-1])
        return [(loss - plain, pairs), (plain, counted[:, 1:].sum().to(loss.device))]

    def take_batch_figures(self) -> Mapping[str, Sequence[float]]:
        """Returns TRL's figures of every evaluated batch, and forgets them."""
        return {name.removeprefix("eval_"): values for name, values in self._stored_metrics.pop("eval").items()}


def load_experimental(method: str) -> tuple[type[ExperimentalTrainer], type]:
    """Returns trainer and arguments of ``orpo`` or ``cpo``.

    Raises:
        MachineError: The installed TRL does not have them.
    """
    name = method.upper()
    try:
        module = importlib.import_module(f"trl.experimental.{method}")
        trainer, arguments = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    except (ImportError, AttributeError) as error:
        raise MachineError(
            f"{describe_versions()} has no {name}: {error}",
            where=f"method: {method}",
            why="it is experimental in TRL and comes and goes between releases",
            fix='pip install "trl==1.16.*", or write method: dpo',
        ) from error
    own = {"__doc__": f"{name}Trainer on Forge's rows."}
    return type(f"Forge{name}Trainer", (ExperimentalTrainer, trainer), own), arguments
