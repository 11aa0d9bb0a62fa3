"""Sections: which values they take, and copies with changes."""

import pytest
from pydantic import ValidationError

from evomerge.study import EngineSection, GenerationSection, PromptSection, SearchSection, Study


@pytest.mark.parametrize(
    ("section", "keys", "held"),
    [
        (SearchSection, {"start": 1, "bounds": [0, 2]}, {"start": 1.0, "bounds": (0.0, 2.0)}),
        (GenerationSection, {"stop": [1, "x"]}, {"stop": ("1", "x")}),
        (PromptSection, {"system": True}, {"system": "True"}),
        (SearchSection, {"vectors": [[1, 2]]}, {"vectors": ((1.0, 2.0),)}),
    ],
)
def test_few_values_are_converted(section, keys, held):
    found = section(**keys)
    for key, value in held.items():
        assert repr(getattr(found, key)) == repr(value)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        (SearchSection, {"trials": True}),
        (SearchSection, {"trials": "5"}),
        (SearchSection, {"trials": 5.0}),
        (SearchSection, {"sigma": "0.3"}),
        (SearchSection, {"sigma": float("inf")}),
        (SearchSection, {"sigma": 10**400}),
        (SearchSection, {"uniform": 0.5}),
        (SearchSection, {"lr_adapt": 1}),
        (SearchSection, {"lr_adapt": "true"}),
        (PromptSection, {"system": 1.5}),
        (GenerationSection, {"stop": "text"}),
        (EngineSection, {"vllm": None}),
        (EngineSection, {"bach_size": 1}),
    ],
)
def test_other_values_are_refused(section, keys):
    with pytest.raises(ValidationError):
        section(**keys)


def test_a_section_is_frozen_and_its_copies_are_validated():
    section = EngineSection(batch_size=4)
    with pytest.raises(ValidationError):
        section.batch_size = 5
    assert section.replace(threads=2) == EngineSection(batch_size=4, threads=2)
    assert hash(section.replace(batch_size=4)) == hash(section)
    with pytest.raises(ValidationError):
        section.replace(batch_size=0)


def test_a_copy_keeps_paths_and_is_what_is_stored():
    study = Study.from_dict(
        {"study": "s", "genome": {"models": ["./a"], "base_model": "b"}, "tasks": [{"file": "t"}]}
    )
    again = study.replace(search=study.search.replace(seed=7))
    assert again.genome.models == ("./a",)
    assert again.to_dict() == study.to_dict() | {"search": study.to_dict()["search"] | {"seed": 7}}
