"""Learning from preferences on TRL's DPO, KTO and reward trainers; ORPO and CPO are in ``experimental``.

Forge's rows are tokens already (``prompt_ids`` and the answers' ids), so TRL tokenises, cuts and drops nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from forge_cli.backend.watching import WatchedTrainer, WeightedMeans
from forge_cli.schema.runspec import RunSpec

# What the reward trainer calls the figures that the others have too.
_REWARD_NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}


def mean_rewards(batches: Mapping[str, Sequence[float]], answers: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Turns means of batches into means over all rows, whatever the batch size was.

    Args:
        batches: TRL's name of a figure to its value in every batch that has one.
        answers: Number of better and of worse answers in every batch.

    Returns:
        ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies`` (0 to 1), ``logps/chosen``
        and ``logps/rejected``, as far as the method has them.
    """
    found = {}
    for side, counts in zip(("chosen", "rejected"), zip(*answers, strict=True), strict=True):
        for name in (f"rewards/{side}", f"logps/{side}"):
            if name in batches:
                found[name] = _weighted_mean(batches[name], [count for count in counts if count])
    pairs = [count for count, _ in answers]
    for name in ("rewards/margins", "rewards/accuracies"):
        if len(batches.get(name, ())) == len(pairs):
            found[name] = _weighted_mean(batches[name], pairs)
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def drop_ties(figures: dict[str, list[float]]) -> None:
    """Takes back the latest batch's share of wins if all its rewards are 0, which TRL counts as lost.

    So they are while the model is its own reference: before the first update, and as long as the rate is 0.
    """
    if not any(figures[f"rewards/{name}"][-1] for name in ("chosen", "rejected", "margins")):
        figures["rewards/accuracies"].pop()
        if not figures["rewards/accuracies"]:
            del figures["rewards/accuracies"]


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


class PreferenceTrainer(WatchedTrainer):
    """What the trainers of preference methods share: rows as they are, figures over rows, a measured start."""

    # Columns that hold the reference's log probabilities; empty for methods without a reference.
    reference_columns: tuple[str, ...] = ()

    def __init__(self, *args, model, **kwargs) -> None:
        self._eval_answers: list[tuple[int, int]] = []
        # PEFT makes these trainable again whenever it switches adapters, as for the reference.
        self._frozen_adapters = [p for n, p in model.named_parameters() if ".default" in n and not p.requires_grad]
        super().__init__(*args, model=model, **kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        """Leaves the rows alone; Forge made them."""
        return dataset

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        """Leaves this to :meth:`compute_reference` and Forge's own cache."""
        return dataset

    def compute_loss(self, *args, **kwargs):
        """Computes TRL's loss; what is frozen of the adapter stays frozen after the reference had its turn."""
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            for parameter in self._frozen_adapters:
                parameter.requires_grad_(False)

    def count_answers(self, inputs: dict) -> tuple[int, int]:
        """Counts the better and the worse answers of a batch."""
        return (inputs["input_ids"].shape[0] // 2,) * 2

    def weigh_loss(self, loss: torch.Tensor, inputs: dict) -> WeightedMeans:
        """The loss is a mean over rows. The sft, aot and kto losses join the rows of a batch, so its size shows."""
        answers = self.count_answers(inputs)
        self._eval_answers.append(answers)
        return [(loss, loss.new_tensor(sum(answers)))]

    def take_batch_figures(self) -> Mapping[str, Sequence[float]]:
        """Returns TRL's figures of every evaluated batch, and forgets them: TRL would log their plain means."""
        figures = dict(self._metrics["eval"])
        self._metrics["eval"].clear()
        return figures

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluates; rewards, margins and accuracies are means over rows."""
        self._eval_answers = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        rewards = mean_rewards(self.take_batch_figures(), self._eval_answers)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in rewards.items()})
        return output

    def measure_start(self) -> dict[str, float]:
        """Evaluates the first training rows as the model stands: ``loss`` and rewards. Draws no random number."""
        self._eval_means, self._eval_answers = [], []
        self.model.eval()
        batch = self._collate(self.train_dataset, 0, self.args.per_device_train_batch_size)
        self.prediction_step(self.model, batch, True)
        return {"loss": self._mean_of_batches(), **mean_rewards(self.take_batch_figures(), self._eval_answers)}

    def compute_reference(self, dataset, batch_size: int) -> dict[str, torch.Tensor]:
        """Computes the reference's log probability ``[N]`` of every answer of a data set."""
        self.model.eval()
        found: list[tuple[torch.Tensor, ...]] = []
        for start in range(0, len(dataset), batch_size):
            batch = self._collate(dataset, start, batch_size)
            figures = self.compute_ref_log_probs(self.ref_model or self.model, batch)
            found.append(tuple(one.float().cpu() for one in figures if one is not None))
        columns = zip(*found, strict=True)
        return {name: torch.cat(column) for name, column in zip(self.reference_columns, columns, strict=True)}

    def _collate(self, dataset, start: int, batch_size: int) -> dict:
        stop = min(start + batch_size, len(dataset))
        return self._prepare_inputs(self.data_collator([dataset[i] for i in range(start, stop)]))


class ForgeDPOTrainer(PreferenceTrainer, DPOTrainer):
    """DPOTrainer on Forge's rows."""

    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def find_joining(self) -> str:
        """Some losses compare the pairs of a batch, or are a mean over its tokens."""
        joining = sorted({"sft", "aot", "aot_unpaired"} & set(self.loss_types))
        return f"preference.loss_type {joining[0]} joins its pairs" if joining else super().find_joining()

    def compute_loss(self, *args, **kwargs):
        """Computes TRL's loss; notes no share of wins where nobody can win."""
        result = super().compute_loss(*args, **kwargs)
        drop_ties(self._metrics["train" if self.model.training else "eval"])
        return result


class ForgeKTOTrainer(PreferenceTrainer, KTOTrainer):
    """KTOTrainer on Forge's rows; the mismatched answers of its KL term are made when a batch is."""

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """The answers' own log probabilities, and those of the mismatched ones where the loss has a KL term."""
        return ("ref_logps", "ref_KL_logps") if self.calculate_KL else ("ref_logps",)

    @property
    def stand_in(self) -> list[int]:
        """The mismatched answer of a row that is alone in its batch, as the last of an epoch or evaluation may be."""
        return self.train_dataset[0]["completion_ids"]

    def find_joining(self) -> str:
        """The KL term is measured over the rows of a batch."""
        return "the KL term of kto is measured over its rows" if self.calculate_KL else super().find_joining()

    def reshape_rows(self, examples: list[dict]) -> list[dict]:
        """Gives every prompt the answer of the row before it in the batch; TRL would give a lone row its own.

        Then the KL term would be that row's own reward, which the loss takes off the reward.
        """
        if not self.calculate_KL:
            return examples
        answers = [one["completion_ids"] for one in examples]
        others = [answers[-1], *answers[:-1]] if len(answers) > 1 else [self.stand_in]
        return [{**one, "KL_completion_ids": other} for one, other in zip(examples, others, strict=True)]

    def count_answers(self, inputs: dict) -> tuple[int, int]:
        """Counts the good and the bad answers of a batch."""
        good = int(inputs["label"].sum())
        return good, len(inputs["label"]) - good


class ForgeRewardTrainer(PreferenceTrainer, RewardTrainer):
    """RewardTrainer on Forge's rows, with the figures named as the other methods name them."""

    def reshape_rows(self, examples: list[dict]) -> list[dict]:
        """Joins each answer to its prompt: whole conversations are scored."""
        return [{name: one["prompt_ids"] + one[name] for name in ("chosen_ids", "rejected_ids")} for one in examples]

    def compute_loss(self, *args, **kwargs):
        """Computes TRL's loss and renames what it noted."""
        result = super().compute_loss(*args, **kwargs)
        for noted in self._metrics.values():
            for name in _REWARD_NAMES.keys() & noted.keys():
                noted[_REWARD_NAMES[name]] += noted.pop(name)
        return result


def list_fields(spec: RunSpec) -> dict[str, object]:
    """Returns the arguments that the method's trainer alone takes."""
    section, method = spec.preference, spec.method
    beta = {"beta": section.beta}
    # Without adapters it tells TRL to load no second model. Forge computes; TRL would hash all weights in vain.
    precompute = {"precompute_ref_log_probs": section.precompute_ref_log_probs and spec.lora is None}
    if method == "dpo":
        losses = section.loss_type or "sigmoid"
        return (
            beta
            | precompute
            | {
                "loss_type": [losses] if isinstance(losses, str) else list(losses),
                "loss_weights": section.loss_weights,
                "label_smoothing": section.label_smoothing,
                "max_length": None,
            }
        )
    if method == "kto":
        weights = {name: getattr(section, name) for name in ("desirable_weight", "undesirable_weight")}
        # The KL term pairs the rows of a batch, and precomputed log probabilities belong to such pairs: batches have
        # to stay what they are. Forge shuffles the rows once.
        fixed = {"train_sampling_strategy": "sequential", "max_length": None}
        return beta | precompute | weights | fixed | {"loss_type": section.loss_type or "kto"}
    if method == "reward":
        return {"center_rewards_coefficient": section.center_rewards_coefficient, "max_length": None}
    # TRL's experimental trainers take None for 512; nothing is cut, as nothing is tokenised there.
    whole = {"max_length": spec.data.max_length}
    if method == "orpo":
        return beta | whole
    names = ("label_smoothing", "cpo_alpha", "simpo_gamma")
    own = {name: getattr(section, name) for name in names}
    return beta | whole | own | {"loss_type": section.loss_type or "sigmoid"}


STABLE: dict[str, tuple[type[WatchedTrainer], type]] = {
    "dpo": (ForgeDPOTrainer, DPOConfig),
    "kto": (ForgeKTOTrainer, KTOConfig),
    "reward": (ForgeRewardTrainer, RewardConfig),
}
