"""Where a search starts: one sibling at 1, several at an equal share; older studies as before."""

import json

import numpy as np
import pytest

from evomerge.genome.genome import make_genome
from evomerge.searching.history import History
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.study import GenomeSection, SearchSection, Study, TaskSource, as_begun, changed_keys


def study(models, method="task_arithmetic", **settings):
    genome = {"merge_method": method, "base_model": "base", "layer_granularity": 2}
    genome |= settings.pop("genome", {})
    return Study(
        genome=GenomeSection(models=tuple(models), **genome),
        tasks=(TaskSource(file="t.jsonl"),),
        study="s",
        search=SearchSection(**settings),
    )


def starts(*arguments, **settings):
    genome = make_genome(study(*arguments, **settings), 4)
    return {gene.start for gene in genome.genes if "density" not in gene.name}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("filters", [None, ("self_attn",)])
def test_several_siblings_share_the_weight_as_in_mergekit_evolve(count, filters):
    # mergekit/evo/genome.py, ModelGenome.initial_genotype: x0_t[:, :, :, 0] = 1 / n_models
    models = [f"m{i}" for i in range(count)]
    assert starts(models, genome={"filters": filters}) == {1 / count}
    assert starts(models, "dare_linear") == {1 / count}
    assert starts(models, "linear", genome={"normalize": False}) == {1 / (count + 1)}


def test_weights_that_are_normalised_are_shares_anyway():
    for method in ("ties", "dare_ties", "linear"):
        assert starts(["a", "b"], method) == {1.0}
    assert starts(["a", "b"], genome={"normalize": True}) == {1.0}
    assert starts(["a", "b"], "ties", genome={"normalize": False}) == {0.5}


def test_slerp_starts_in_the_middle_of_its_walk():
    genome = make_genome(study(["a", "b"], "slerp"), 4)
    assert [gene.start for gene in genome.genes] == [gene.high / 2 for gene in genome.genes]


def test_a_start_of_the_file_and_bounds_are_kept():
    assert starts(["a", "b"], start=1.0) == {1.0}
    assert starts(["a", "b"], start=0.2) == {0.2}
    assert starts(["a", "b"], bounds=(0.6, 1.0)) == {0.8}, "1/2 is outside: the middle"
    assert starts(["a"], bounds=(0.0, 0.5)) == {0.25}


def test_the_middle_of_all_draws_is_the_start():
    one = study(["a", "b"])
    sampler = make_sampler(one, make_genome(one, 4))
    assert np.array_equal(sampler.start(History()).mean, np.full(4, 0.5))


def test_an_older_study_keeps_its_start():
    now = study(["a", "b"])
    stored = json.loads(json.dumps(now.to_dict()))
    stored["search"]["start"] = 1.0  # what every study of 0.1 and 0.2 has stored
    assert changed_keys(stored, now.to_dict()) == ["search.start"]
    begun = as_begun(now, stored)
    assert begun.search.start == 1.0
    assert changed_keys(stored, begun.to_dict()) == []
    without = json.loads(json.dumps(stored))
    del without["search"]["start"]
    assert as_begun(now, without).search.start == 1.0
    assert as_begun(now, None) == now
    assert as_begun(now, now.to_dict()) == now
    other = study(["a", "b"], start=0.7)
    assert as_begun(other, stored) == other, "what the file says is compared, not replaced"
    assert changed_keys(stored, other.to_dict()) == ["search.start"]
