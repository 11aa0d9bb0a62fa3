"""Step one of a search: its models, tasks, genome and sampler, from the study file alone.

Nothing is written, so most of what a user can get wrong is raised here, before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from evomerge.answering.lm_eval.documents import LmEvalTasks
from evomerge.errors import StudyFileError
from evomerge.genome.genome import Genome, make_genome
from evomerge.knowledge.chooser import Chooser, open_knowledge
from evomerge.knowledge.records import Knowledge
from evomerge.knowledge.retrieval.interface import comparison_key
from evomerge.merging.checkpoints.compatibility import check_fit
from evomerge.merging.checkpoints.model_folder import ModelFolder, num_layers
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.searching.answer_room import with_room_for_prompts
from evomerge.searching.front.objective_values import FrontObjective, study_objectives, task_groups
from evomerge.searching.samplers.cma import CmaSampler
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.study import Study
from evomerge.tasks import Split, Task, load_dataset_tasks, load_tasks, split_tasks


@dataclass(frozen=True)
class Problem:
    """What is searched, on which tasks, and how the next vector is drawn."""

    study: Study
    genome: Genome
    split: Split
    sampler: CmaSampler

    @property
    def objectives(self) -> tuple[FrontObjective, ...]:
        """The study's objectives, as of `study_objectives`."""
        return study_objectives(self.study, task_groups(self.study, self.split))


@dataclass(frozen=True)
class Prepared(Problem):
    """A problem with its models and tasks, as the study file determines them."""

    tasks: tuple[Task, ...]
    base: ModelFolder
    siblings: list[ModelFolder]
    chooser: Chooser | None = None  # of a knowledge base
    lm_eval: LmEvalTasks | None = None


def prepare(study: Study, say: Callable[[str], None]) -> Prepared:
    """Read and check what the study file names.

    Raises StudyFileError, TaskError, ModelError, RecipeError, KnowledgeError, InputError.
    """
    lm_eval = LmEvalTasks(study) if study.lm_eval else None
    tasks = study_tasks(study) if lm_eval is None else lm_eval.tasks
    split = split_tasks(tasks, study.split.held_out, study.split.seed, study.split.validation)
    task_groups(study, split)  # an empty one is refused here
    if lm_eval is not None:
        lm_eval.check_split(split)
    base, siblings = open_models(study)
    study = with_room_for_prompts(study, base, say)
    genome = make_genome(study, num_layers(base.config))
    check_filters(genome, base)
    chooser = open_knowledge(study.prompt, say)
    sampler = make_sampler(study, genome)
    return Prepared(study, genome, split, sampler, tasks, base, siblings, chooser, lm_eval)


def study_tasks(study: Study) -> tuple[Task, ...]:
    """The tasks of every source; where there are several, each task names its own.

    Raises TaskError.
    """
    if study.lm_eval:
        return LmEvalTasks(study).tasks
    groups = []
    for source in study.tasks:
        if source.file:
            groups.append(load_tasks(source.file))
        else:
            groups.append(load_dataset_tasks(source.dataset or "", source.split))
    if len(groups) == 1:
        return groups[0]
    tasks: list[Task] = []
    for i, group in enumerate(groups):
        tasks += [replace(task, source=i) for task in group]
    return tuple(tasks)


def open_models(study: Study) -> tuple[ModelFolder, list[ModelFolder]]:
    """The base, or the first model in its place, and the others. Raises ModelError.

    They are checked to fit each other.
    """
    base, *others = [open_model(ref) for ref in study.genome.all_models]
    check_fit(base, others, same_vocabulary=study.genome.tokenizer_source is None)
    return base, others


def check_filters(genome: Genome, base: ModelFolder) -> None:
    """Raise StudyFileError for a filter that matches no tensor, whose numbers change nothing."""
    names = "\n".join(base.keys)
    for text in genome.filters:
        if text not in names:
            raise StudyFileError(
                "no tensor name contains this",
                where="genome.filters",
                found=text,
                remedy="Write self_attn or mlp, for example.",
            )


def held_out_examples(knowledge: Knowledge, split: Split) -> int:
    """How many examples of a knowledge base are tasks that the search must not see."""
    unseen = {comparison_key(task.input) for task in (*split.held_out, *split.validation)}
    known = [comparison_key(example.input) for example in knowledge.examples]
    return len([text for text in known if text in unseen])
