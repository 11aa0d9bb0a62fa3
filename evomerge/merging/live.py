"""A live model whose weights are replaced in place, each candidate's from the untouched base.

Adding a difference of weights to the live ones would drift; see docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging import quantized
from evomerge.merging.checkpoints.model_folder import (
    HEAD,
    VOCABULARY,
    ModelFolder,
    same_model,
)
from evomerge.merging.methods import fused
from evomerge.merging.methods.registry import get_method
from evomerge.merging.placement import (
    Inputs,
    LiveParameter,
    Residency,
    Resident,
    is_out_of_memory,
)
from evomerge.merging.stream import MergePlan
from evomerge.merging.tensor_merge import check_merged, merge_tensors
from evomerge.recipe import Recipe


class LiveModel:
    """`apply` writes a recipe's weights into the parameters of `model`, each on its own device.

    A 4-bit parameter is merged in the dtype that it was quantised from, and quantised again.
    `Resident` keeps what is read for that wherever it fits.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: ModelFolder,
        siblings: Sequence[ModelFolder],
        random_seed: int = 0,
        residency: Literal["auto"] | Residency = "auto",
    ) -> None:
        """`random_seed` decides what DARE drops. Raises ModelError where model and files differ."""
        self.base, self.siblings, self.random_seed = base, list(siblings), random_seed
        stored = any(HEAD in folder.keys for folder in (base, *siblings))
        if stored:
            _untie(model)
        self.live = dict(model.named_parameters())
        names = set(base.keys) - {HEAD}
        if stored and HEAD in self.live:
            names.add(HEAD)
        self.names = sorted(names)
        self._check_names()
        parameters = {}
        for name in self.names:
            parameter, elements = self.live[name], torch.Size(base.shape(name)).numel()
            parameters[name] = LiveParameter(parameter.device, quantized.dtype(parameter), elements)
        self.resident = Resident(base, siblings, parameters, residency)
        self._parameters = sum(parameter.elements for parameter in parameters.values())
        self._plan: MergePlan | None = None  # the last one
        self._applied: dict[str, object] = {}  # what each parameter holds now

    def _check_names(self) -> None:
        """Raise ModelError unless files and live model have the same tensors."""
        models = (self.base, *self.siblings)
        if HEAD not in self.live and any(model.is_untied() for model in models):
            raise ModelError(
                f"a file stores {HEAD}, which the live model ties to its embeddings",
                where=self.base.path,
                remedy="Save the models with transformers, or use engine.kind: transformers.",
            )
        for name in self.names:
            if name not in self.live:
                raise ModelError(
                    f"the live model has no parameter {name}",
                    where=self.base.path,
                    remedy="This architecture cannot be merged in place.",
                )
        # such a parameter would keep its loaded weights
        for name in self.live.keys() - set(self.names):
            raise ModelError(
                f"the file has no tensor for {name}",
                where=self.base.path,
                remedy="Save the model again with transformers.",
            )

    @torch.no_grad()
    def apply(self, recipe: Recipe) -> None:
        """Give every parameter the recipe's weights, in place, unless it has them already.

        Raises RecipeError when a live model cannot follow, ModelError on NaN or infinite weights,
        EngineError when even streaming needs more memory than there is.
        """
        plan = self._plan = self.plan(recipe, after=self._plan)
        self._check_in_place(plan)
        states = {name: self._state(plan, name) for name in self.names}
        stale = [name for name in self.names if self._applied.get(name) != states[name]]
        streamed = []
        for name in stale:
            planned, dtype = plan.holder(name), self.resident.parameters[name].dtype
            if plan.needs_no_cast_or_realignment(planned, dtype) and self._has_base(plan, planned):
                streamed.append(name)
                continue
            with self._marking(name, states[name]):
                self._write_from_files(name, plan)
        self._write_streamed(streamed, plan, states)

    def plan(self, recipe: Recipe, after: MergePlan | None = None) -> MergePlan:
        """How a recipe of the loaded models is merged; `after` as for `MergePlan`.

        Raises ModelError for a model that is not loaded, RecipeError as `MergePlan` does.
        """
        models = {ref: self._find(ref) for ref in recipe.models}
        return MergePlan(recipe, models, self.random_seed, after=after)

    @contextmanager
    def _marking(self, name: str, state: object) -> Iterator[None]:
        """While a parameter is written it holds nothing known; afterwards `state`."""
        self._applied.pop(name, None)  # an interrupted write must not count as done
        yield
        self._applied[name] = state

    def _write_streamed(
        self, names: Sequence[str], plan: MergePlan, states: Mapping[str, object]
    ) -> None:
        """Merge tensors from their inputs alone; out of memory, again with less of them kept."""
        while names:
            try:
                for name, inputs in self.resident.stream(names, plan.layout.method.takes_deltas):
                    with self._marking(name, states[name]):
                        self._write(name, plan, inputs)
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.resident.retreat()
                names = [name for name in names if self._applied.get(name) != states[name]]

    def _check_in_place(self, plan: MergePlan) -> None:
        """Raise RecipeError for layers or rows that would leave their place."""
        if plan.layout.restacked:
            raise RecipeError(
                "the slices move layers, which a live model cannot follow",
                remedy="Build the model with `evomerge merge`.",
            )
        vocabulary = plan.vocabulary
        if vocabulary is None:
            return
        rows = min(self.base.shape(name)[0] for name in VOCABULARY if name in self.base.keys)
        if not vocabulary.keeps(plan.recipe.donor) or vocabulary.size > rows:
            raise RecipeError(
                "`tokenizer_source` would move rows of the live model's embeddings",
                found=plan.recipe.tokenizer,
                remedy="Merge the tokenizers first: "
                "`evomerge merge` each sibling, then search over the results.",
            )

    def _has_base(self, plan: MergePlan, planned: str) -> bool:
        """Whether a tensor's deltas, if it has any, are those from the loaded base."""
        base = plan.tensors[planned].base
        if base is None or not plan.layout.method.takes_deltas:
            return True
        return plan.models[base[0]] is self.base

    def _write_from_files(self, name: str, plan: MergePlan) -> None:
        """Merge one tensor whose dtype changes or whose rows move."""
        parameter = self.live[name]
        merged = plan.merge(plan.holder(name), parameter.device).to(
            self.resident.parameters[name].dtype
        )
        if plan.vocabulary is not None and name in VOCABULARY:
            parameter[: len(merged)].copy_(merged)  # rows that no token has are left unchanged
        else:
            quantized.write(parameter, merged)

    def _write(self, name: str, plan: MergePlan, inputs: Inputs) -> None:
        """Merge one tensor from its inputs on its device."""
        planned = plan.holder(name)
        out, tensor = self.live[name], plan.tensors[planned]
        method = get_method(tensor.method)
        # a sibling that is the base itself has no delta here
        others = {}
        for ref, _ in tensor.inputs:
            if plan.models[ref] is not self.base:
                others[ref] = inputs.others[self.siblings.index(plan.models[ref])]
        if tensor.is_single_delta and not quantized.is_quantized(out):
            delta = others[tensor.siblings[0][0]]
            kernel = fused.kernel(out.device, out.dtype, self._parameters)
            kernel(out, inputs.base_no_neg_zero, delta, tensor.weights[0])
            return
        generator = plan.generator(planned)
        if method.takes_deltas:
            deltas = [others[ref] for ref, _ in tensor.siblings]
            merged = method.merge(inputs.base, deltas, tensor, generator)
            if not method.finite:
                check_merged(merged, tensor)
        else:
            tensors = {ref: others.get(ref, inputs.base) for ref, _ in tensor.inputs}
            merged = merge_tensors(tensor, tensors, generator)
        quantized.write(out, merged)

    def _state(self, plan: MergePlan, name: str) -> object:
        """Everything that decides a parameter's bits."""
        name = plan.holder(name)
        tensor = plan.tensors[name]
        places = tuple(plan.models[ref].places for ref, _ in tensor.inputs)
        drawn = plan.draws.starts.get(name)
        return tensor, places, plan.working_dtype(name), plan.dtype(name), drawn

    def _find(self, ref: str) -> ModelFolder:
        """The folder that a recipe's reference means. Raises ModelError."""
        for folder in (self.base, *self.siblings):
            if same_model(folder, ref):
                return folder
        raise ModelError(
            "the recipe names a model that is not loaded",
            where=ref,
            remedy="Load it as the base or a sibling.",
        )


def _untie(model: Any) -> None:
    """Give a head that is the embeddings weights of its own; the merged ones may differ."""
    is_transformers_model = hasattr(model, "get_output_embeddings")
    if HEAD in dict(model.named_parameters()) or not is_transformers_model:
        return
    head = model.get_output_embeddings()
    tied = head.weight
    head.weight = torch.nn.Parameter(tied.detach().clone(), tied.requires_grad)
    model.config.tie_word_embeddings = False
