"""The study file: YAML in, one validated, frozen object out.

Everything is checked here, once; a message names the key, the value found and the remedy.
"""

from evomerge.study.comparing import STOPPING_KEYS, as_begun, changed_keys, model_refs
from evomerge.study.engine_keys import EngineSection, VllmSection
from evomerge.study.environment import value_prints
from evomerge.study.files_read import files_read
from evomerge.study.genome_keys import GenomeSection, mixes_models
from evomerge.study.judge_keys import JUDGE_MODEL, JudgeSection
from evomerge.study.objective_keys import GROUP, SOURCE, ObjectiveSection, source_names
from evomerge.study.older_defaults import BEFORE
from evomerge.study.prompt_keys import (
    GenerationSection,
    PromptSection,
    ReasoningSection,
    SplitSection,
    TaskSource,
)
from evomerge.study.reading import overridden, read_judge, read_setting, read_study
from evomerge.study.schema import study_schema
from evomerge.study.search_keys import SUBSET, SearchSection
from evomerge.study.study_file import Study

__all__ = [
    "BEFORE",
    "GROUP",
    "JUDGE_MODEL",
    "SOURCE",
    "STOPPING_KEYS",
    "SUBSET",
    "EngineSection",
    "GenerationSection",
    "GenomeSection",
    "JudgeSection",
    "ObjectiveSection",
    "PromptSection",
    "ReasoningSection",
    "SearchSection",
    "SplitSection",
    "Study",
    "TaskSource",
    "VllmSection",
    "as_begun",
    "changed_keys",
    "files_read",
    "mixes_models",
    "model_refs",
    "overridden",
    "read_judge",
    "read_setting",
    "read_study",
    "source_names",
    "study_schema",
    "value_prints",
]
