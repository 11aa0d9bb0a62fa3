"""A live model whose weights are replaced in place, each candidate computed from the untouched
base.

Adding a difference of weights to what is live would drift; see docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging import quantized
from evomerge.merging.checkpoints.model_folder import HEAD, VOCABULARY, ModelFolder, same_model
from evomerge.merging.layout import How
from evomerge.merging.methods import fused
from evomerge.merging.placement import Inputs, Residency, Resident, Slot, is_out_of_memory
from evomerge.merging.stream import MergePlan, combine, from_deltas
from evomerge.recipe import Recipe

ADDING = ("task_arithmetic", "ties", "dare_ties", "dare_linear")  # these add deltas to the base


class LiveModel:
    """`apply` writes a recipe's weights into the parameters of `model`, each on its own device.

    A 4-bit parameter is merged in the dtype that it was quantised from, and quantised again. What
    is read for that
    waits where it fits: see `Resident`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: ModelFolder,
        siblings: Sequence[ModelFolder],
        random_seed: int = 0,
        residency: Literal["auto"] | Residency = "auto",
    ) -> None:
        """`random_seed` decides what DARE drops. Raises ModelError when the live model lacks a
        tensor of the files.
        """
        self.base, self.siblings, self.random_seed = base, list(siblings), random_seed
        self.live = dict(model.named_parameters())
        if HEAD not in self.live and any(HEAD in folder.keys for folder in (base, *siblings)):
            raise ModelError(
                f"a file stores {HEAD}, which the live model ties to its embeddings",
                where=base.path,
                remedy="Save the models with transformers.",
            )
        self.names = sorted(base.keys)
        for name in self.names:
            if name not in self.live:
                raise ModelError(
                    f"the live model has no parameter {name}",
                    where=base.path,
                    remedy="This architecture cannot be merged in place.",
                )
        # it would keep what the model was loaded with
        for name in self.live.keys() - set(self.names):
            raise ModelError(
                f"the file has no tensor for {name}",
                where=base.path,
                remedy="Save the model again with transformers.",
            )
        slots = {
            n: Slot(
                self.live[n].device,
                quantized.dtype(self.live[n]),
                torch.Size(base.shape(n)).numel(),
            )
            for n in self.names
        }
        self.resident = Resident(base, siblings, slots, residency)
        self._parameters = sum(slot.numbers for slot in slots.values())
        self._plan: MergePlan | None = None  # the last one
        self._applied: dict[str, object] = {}  # what each parameter holds now

    @torch.no_grad()
    def apply(self, recipe: Recipe) -> None:
        """Give every parameter the recipe's weights, in place; parameters that would not change are
        skipped.

        Raises RecipeError when a live model cannot follow, ModelError on NaN or infinite weights,
        EngineError when even streaming needs more memory than there is.
        """
        plan = MergePlan(
            recipe,
            {ref: self._find(ref) for ref in recipe.models},
            self.random_seed,
            after=self._plan,
        )
        self._plan = plan
        if plan.layout.restacked:
            raise RecipeError(
                "the slices move layers, which a live model cannot follow",
                remedy="Build the model with `evomerge merge`.",
            )
        if plan.vocabulary is not None and (
            not plan.vocabulary.keeps(recipe.donor) or plan.vocabulary.size > self._rows()
        ):
            raise RecipeError(
                "`tokenizer_source` would move rows of the live model's embeddings",
                found=recipe.tokenizer,
                remedy="Merge the tokenizers first: `evomerge merge` each sibling, then search over the results.",
            )
        states = {name: self._state(plan, name) for name in self.names}
        stale = [name for name in self.names if self._applied.get(name) != states[name]]
        streamed = [name for name in stale if plan.pure(name, self.resident.slots[name].dtype)]
        for name in set(stale) - set(streamed):
            self._applied.pop(name, None)
            merged = plan.merge(name, self.live[name].device).to(self.resident.slots[name].dtype)
            # rows that no token has stay as they are
            if plan.vocabulary is not None and name in VOCABULARY:
                self.live[name][: len(merged)].copy_(merged)
            else:
                quantized.write(self.live[name], merged)
            self._applied[name] = states[name]
        while streamed:
            try:
                for name, inputs in self.resident.stream(streamed, recipe.merge_method in ADDING):
                    self._applied.pop(name, None)  # an interrupted write must not count as done
                    self._write(name, plan, inputs)
                    self._applied[name] = states[name]
                streamed = []
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.resident.retreat()
                streamed = [name for name in streamed if self._applied.get(name) != states[name]]

    def _write(self, name: str, plan: MergePlan, inputs: Inputs) -> None:
        """Merge one tensor from what is on its device."""
        out, how = self.live[name], plan.hows[name]
        generator = plan.draws.generator(name) if how.draws else None
        others = {
            ref: inputs.others[self.siblings.index(plan.models[ref])]
            for ref, _ in how.siblings
            if plan.models[ref] is not self.base
        }
        if how.method not in ADDING:
            merged = combine(
                how, {ref: others.get(ref, inputs.base) for ref, _ in how.inputs}, generator
            )
        elif _one_delta(how) and not quantized.is_quantized(out):
            fused.kernel(out.device, out.dtype, self._parameters)(
                out, inputs.positive, next(iter(others.values())), how.weights[0]
            )
            return
        else:
            merged = from_deltas(
                how, inputs.base, [others[ref] for ref, _ in how.siblings], generator
            )
        quantized.write(out, merged)

    def _rows(self) -> int:
        return min(self.base.shape(name)[0] for name in VOCABULARY if name in self.base.keys)

    def _state(self, plan: MergePlan, name: str) -> object:
        """All that decides a parameter's bits."""
        how = plan.hows[name]
        drawn = plan.draws.starts[name] if how.draws else None
        return (
            how,
            tuple(plan.models[ref].places for ref, _ in how.inputs),
            plan.working_dtype(name),
            plan.dtype(name),
            drawn,
        )

    def _find(self, ref: str) -> ModelFolder:
        """The folder that a recipe's reference means. Raises ModelError."""
        found = next(
            (folder for folder in (self.base, *self.siblings) if same_model(folder, ref)), None
        )
        if found is None:
            raise ModelError(
                "the recipe names a model that is not loaded",
                where=ref,
                remedy="Load it as the base or a sibling.",
            )
        return found


def _one_delta(how: How) -> bool:
    """One sibling, one weight, nothing else: what every candidate of the plain search is."""
    return (
        how.method == "task_arithmetic"
        and len(how.siblings) == 1
        and not how.normalize
        and how.scale == 1
    )
