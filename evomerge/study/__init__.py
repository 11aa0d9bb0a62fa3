"""The study file: YAML in, one validated, frozen object out. Everything is checked here, once; a
message names the key, the value found and the remedy.
"""

from evomerge.study.reading import (
    STOPPING_KEYS,
    changed_keys,
    overridden,
    read_judge,
    read_setting,
    read_study,
)
from evomerge.study.rules import check_judge
from evomerge.study.sections import (
    BEFORE,
    DENSE,
    JUDGE_MODEL,
    MIXING,
    SUBSET,
    EngineSection,
    GenerationSection,
    GenomeSection,
    JudgeSection,
    ObjectiveSection,
    PromptSection,
    SearchSection,
    SplitSection,
    Study,
    TaskSource,
    VllmSection,
)

__all__ = [
    "BEFORE", "DENSE", "JUDGE_MODEL", "MIXING", "STOPPING_KEYS", "SUBSET", "EngineSection", "GenerationSection", "GenomeSection",
    "JudgeSection", "ObjectiveSection", "PromptSection", "SearchSection", "SplitSection", "Study", "TaskSource", "VllmSection",
    "changed_keys", "check_judge", "overridden", "read_judge", "read_setting", "read_study",
]  # fmt: skip
