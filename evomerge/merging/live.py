"""A live model whose weights are replaced in place, each candidate's from the untouched base.

Adding a difference of weights to the live ones would drift; see docs/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from evomerge.errors import ModelError, RecipeError
from evomerge.merging import quantized
from evomerge.merging.architecture.conversion import Group
from evomerge.merging.architecture.roles import Role
from evomerge.merging.checkpoints.model_folder import ModelFolder, same_model
from evomerge.merging.device_memory import is_out_of_memory
from evomerge.merging.methods import fused
from evomerge.merging.methods.registry import get_method
from evomerge.merging.module_space import ModuleSpace, ModuleView, tensors_of, untie
from evomerge.merging.placement import Inputs, LiveParameter, Residency, Resident
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
        cache: float = 0.0,
    ) -> None:
        """`random_seed` decides what DARE drops; `cache` is for `Resident`.

        Raises ModelError where model and files differ.
        """
        self.base, self.siblings, self.random_seed = base, list(siblings), random_seed
        stored = {name for name in base.keys if base.dtype(name).is_floating_point}
        stored -= {base.head}
        if any(folder.head in folder.keys for folder in (base, *siblings)):
            untie(model)
            stored.add(base.head)
        self.space = ModuleSpace(model, base, stored)
        self.live = tensors_of(model)
        self._check_names()
        self.names = [name for name in self.space.names if name in self.live]
        parameters = {}
        for name in self.names:
            parameter = self.live[name]
            elements = torch.Size(quantized.shape(parameter)).numel()
            parameters[name] = LiveParameter(parameter.device, quantized.dtype(parameter), elements)
        views = [ModuleView(folder, self.space) for folder in siblings]
        whole = ModuleView(base, self.space)
        self.resident = Resident(whole, views, parameters, residency, cache)
        self._parameters = sum(parameter.elements for parameter in parameters.values())
        self._plan: MergePlan | None = None  # the last one
        self._applied: dict[str, object] = {}  # what each parameter holds now

    def _check_names(self) -> None:
        """Raise ModelError unless files and live model have the same tensors."""
        models = (self.base, *self.siblings)
        made = set(self.space.names)
        head = self.base.head
        is_tied = not any(name in self.live for name in self._targets(head))
        if is_tied and any(model.is_untied() for model in models):
            raise ModelError(
                f"a file stores {head}, which the live model ties to its embeddings",
                where=self.base.path,
                remedy="Save the models with transformers, or use engine.kind: transformers.",
            )
        for name in self.space.left_out:
            is_outside = self.base.architecture.role(name) == Role.OUTSIDE
            if not is_outside and name not in self.base.spare:
                raise ModelError(
                    f"the live model has no parameter {name}",
                    where=self.base.path,
                    remedy="This architecture cannot be merged in place.",
                )
        # such a parameter would keep its loaded weights; a buffer has what the code gives it
        for name in self.live.keys() - made:
            if not isinstance(self.live[name], torch.nn.Parameter):
                continue
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
        self.check_in_place(plan)
        states = {name: self._state(plan, name) for name in self.names}
        stale = [name for name in self.names if self._applied.get(name) != states[name]]
        streamed: list[str] = []
        groups: dict[str, list[str]] = {}
        for name in stale:
            if self._is_streamed(plan, name):
                streamed.append(name)
            else:
                group = self.space.group(name)
                groups.setdefault(group.target, []).append(name)
        for names in groups.values():
            self._write_from_files(names, plan, states)
        self._write_streamed(streamed, plan, states)

    def planned(self, plan: MergePlan, name: str) -> str:
        """The merged tensor, by its name in the files, that says how a parameter is merged.

        Of several that become one parameter it is the first.
        """
        return plan.holder(self.space.group(name).sources[0])

    def _is_streamed(self, plan: MergePlan, name: str) -> bool:
        """Whether the parameter can be merged as it is, from the parameters of the inputs."""
        group, dtype = self.space.group(name), self.resident.parameters[name].dtype
        planned = self.planned(plan, name)
        if not plan.needs_no_cast_or_realignment(planned, dtype):
            return False
        if not self._has_base(plan, planned):
            return False
        tensor = plan.tensors[planned]
        if tensor.is_copy and plan.models[tensor.inputs[0][0]] is not self.base:
            return False
        if group.converter is None:
            return True
        if not plan.elementwise(planned) or planned in plan.draws.starts:
            return False
        return not plan.differs_in_a_layer or self._are_alike(plan, group)

    def _are_alike(self, plan: MergePlan, group: Group) -> bool:
        """Whether the tensors of a group are merged in one way and one dtype."""
        first, *others = group.sources
        tensor, dtypes = plan.tensors[first].without_names, self._dtypes(plan, first)
        for source in others:
            if plan.tensors[source].without_names != tensor or self._dtypes(plan, source) != dtypes:
                return False
        return True

    def _dtypes(self, plan: MergePlan, source: str) -> tuple[torch.dtype, torch.dtype]:
        return plan.working_dtype(source), plan.dtype(source)

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

    def check_in_place(self, plan: MergePlan) -> None:
        """Raise RecipeError for layers or rows that would leave their place."""
        if plan.layout.restacked:
            raise RecipeError(
                "the slices move layers, which a live model cannot follow",
                remedy="Build the model with `evomerge merge`.",
            )
        vocabulary = plan.vocabulary
        if vocabulary is None:
            return
        stored = [name for name in self.base.vocabulary if name in self.base.keys]
        rows = min(self.base.shape(name)[0] for name in stored)
        if not vocabulary.keeps(plan.recipe.donor) or vocabulary.size > rows:
            raise RecipeError(
                "`tokenizer_source` would move rows of the live model's embeddings",
                found=plan.recipe.tokenizer.source if plan.recipe.tokenizer else None,
                remedy="Merge the tokenizers first: "
                "`evomerge merge` each sibling, then search over the results.",
            )

    def _has_base(self, plan: MergePlan, planned: str) -> bool:
        """Whether a tensor's deltas, if it has any, are those from the loaded base."""
        base = plan.tensors[planned].base
        if base is None or not plan.layout.method.takes_deltas:
            return True
        return plan.models[base[0]] is self.base

    def _write_from_files(
        self, names: Sequence[str], plan: MergePlan, states: Mapping[str, object]
    ) -> None:
        """Merge a group as the files have it: whole tensors, changing dtypes, rows that move."""
        group = self.space.group(names[0])
        device = self.live[names[0]].device
        made = self.space.made_of(group, lambda name: plan.merge(plan.holder(name), device))
        for name in names:
            parameter = self.live[name]
            merged = made[name].to(parameter.device, self.resident.parameters[name].dtype)
            with self._marking(name, states[name]):
                if plan.vocabulary is not None and group.sources[0] in self.base.vocabulary:
                    # rows that no token has are left unchanged
                    parameter[: len(merged)].copy_(merged)
                else:
                    quantized.copy_or_quantize(parameter, merged)

    def _targets(self, source: str) -> list[str]:
        """The parameters that a tensor of the files becomes."""
        return [name for name in self.space.names if source in self.space.group(name).sources]

    def _write(self, name: str, plan: MergePlan, inputs: Inputs) -> None:
        """Merge one tensor from its inputs on its device."""
        planned = self.planned(plan, name)
        out, tensor = self.live[name], plan.tensors[planned]
        if tensor.is_copy:
            quantized.copy_or_quantize(out, inputs.base)
            return
        method = get_method(tensor.method)
        # a sibling that is the base itself has no delta here
        others = {}
        for ref, _ in tensor.inputs:
            if plan.models[ref] is not self.base:
                others[ref] = inputs.others[self.siblings.index(plan.models[ref])]
        if tensor.is_single_delta and not quantized.is_quantized(out):
            delta = others[tensor.siblings[0][0]]
            merge_into = fused.kernel(out.device, out.dtype, self._parameters)
            merge_into(out, inputs.base_no_neg_zero, delta, tensor.weights[0])
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
        quantized.copy_or_quantize(out, merged)

    def _state(self, plan: MergePlan, name: str) -> object:
        """Everything that decides a parameter's bits."""
        sources = self.space.group(name).sources
        if not plan.differs_in_a_layer:
            sources = sources[:1]
        return tuple(self._state_of(plan, source) for source in sources)

    def _state_of(self, plan: MergePlan, source: str) -> object:
        name = plan.holder(source)
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
