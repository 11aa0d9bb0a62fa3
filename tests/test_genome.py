"""The genome against mergekit-evolve's own reading of a vector, and its one-to-one promise under
random genomes.
"""

import itertools
import json
import math
import os
import random
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from merging_tools import load_all, make_family

from evomerge.cli import main
from evomerge.genome.genome import make_genome, walk
from evomerge.genome.search_space import model_names
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import MergePlan
from evomerge.recipe import METHODS, Recipe, task_arithmetic_recipe
from evomerge.study import GenomeSection, SearchSection, Study, TaskSource

DELTAS = ("task_arithmetic", "ties", "dare_ties", "dare_linear")
MORE = (
    "passthrough",
    "nuslerp",
    "multislerp",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "sce",
    "nearswap",
    "ram",
    "ramplus_tl",
)
LAYERS = 6


def genome(search=None, **section):
    """The genome of a study with these keys."""
    study = Study(
        genome=GenomeSection(**section),
        tasks=(TaskSource(file="t.jsonl"),),
        search=SearchSection(**(search or {})),
    )
    return make_genome(study, LAYERS)


@st.composite
def genomes(draw):
    method = draw(st.sampled_from([*DELTAS, "linear", "slerp", *MORE]))
    traits = METHODS[method]
    base = draw(st.sampled_from(["base"] if method in DELTAS else [None, "base", "m1"]))
    several = draw(st.integers(1 if base == "base" else 2, 4))
    if method in MORE:
        least, most = traits.siblings
        base = "base" if traits.needs_base else None
        if traits.optional_base:
            base = draw(st.sampled_from([None, "base"]))
        several = draw(st.integers(max(least, 1 if base or most == 1 else 2), most or 4))
    section = {
        "merge_method": method,
        "base_model": base,
        "models": tuple(f"m{i}" for i in range(several)),
    }
    section["layer_granularity"] = draw(st.sampled_from([-1, 0, 1, 2, 3]))
    section["normalize"] = draw(st.sampled_from([None, False, True]))
    section["tokenizer_source"] = draw(st.sampled_from([None, "base"]))
    if method != "slerp":
        section["smooth"] = draw(st.booleans())
        section["filters"] = draw(st.sampled_from([None, ("self_attn",), ("mlp", "self_attn")]))
        section["allow_negative_weights"] = draw(st.booleans())
    return genome(**section)


def vectors(g):
    return st.tuples(*(st.floats(gene.low, gene.high) for gene in g.genes))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_different_vectors_give_different_recipes(data):
    g = data.draw(genomes())
    one = data.draw(vectors(g))
    gene = data.draw(st.integers(0, g.dimensions - 1))
    low, high = g.genes[gene].low, g.genes[gene].high
    assume("epsilon" not in g.names[gene] or "epsilon" not in g.parameters)
    near = math.nextafter(one[gene], low if one[gene] == high else high)
    other = data.draw(st.sampled_from([near, *({low, high} - {one[gene]})]))
    two = (*one[:gene], other, *one[gene + 1 :])
    a, b = g.decode(one), g.decode(two)
    assert a.to_dict() != b.to_dict()
    assert a.to_yaml() != b.to_yaml()
    assert Recipe.from_dict(yaml.safe_load(a.to_yaml())) == a


@given(genomes())
@settings(max_examples=60, deadline=None)
def test_genes_have_names_of_their_own_and_start_inside_their_range(g):
    assert len(set(g.names)) == g.dimensions == len({gene.label for gene in g.genes})
    groups = (
        g.dimensions
        if g.method == "slerp"
        else len(g.slices)
        * (len(g.filters) + 1)
        * (len(g.models) * len(g.parameters) + len(g.shared_parameters))
    )
    assert g.dimensions == groups
    for gene in g.genes:
        assert gene.low < gene.start < gene.high
        assert gene.scale * (g.weight_bounds[1] - g.weight_bounds[0]) == pytest.approx(
            gene.high - gene.low
        )


def test_plain_genomes_keep_their_names_and_their_recipes():
    one = genome(base_model="base", models=("a",), layer_granularity=2)
    assert one.names == ("layers 0-1 · a", "layers 2-3 · a", "layers 4-5 · a")
    assert [gene.label for gene in one.genes] == ["0–1", "2–3", "4–5"]
    two = genome(base_model="base", models=("a", "x/b"), layer_granularity=3)
    assert two.names == (
        "layers 0-2 · a",
        "layers 0-2 · b",
        "layers 3-5 · a",
        "layers 3-5 · b",
    )
    assert two.genes[1].label == "0–2 b"
    plain = task_arithmetic_recipe("base", ["a", "x/b"], [(0, 3), (3, 6)], [[0.1, 0.2], [0.3, 0.4]])
    assert two.decode([0.1, 0.2, 0.3, 0.4]).to_yaml() == plain.to_yaml()


def test_names_of_parameters_filters_and_points():
    g = genome(base_model="base", models=("a", "b"), merge_method="ties", filters=("mlp",))
    tail = ["mlp", "density · mlp", "rest", "density · rest"]
    assert g.names[:4] == tuple(f"layers 0-5 · a · {name}" for name in tail)
    assert g.genes[1].label == "0–5 a density mlp"
    assert genome(base_model="base", models=("a",), smooth=True, layer_granularity=2).names == (
        "point 0 · a",
        "point 1 · a",
        "point 2 · a",
    )


@pytest.mark.parametrize(
    ("refs", "names"),
    [
        (("a", "x/b"), ("a", "b")),
        (("x/a", "y/a", "b"), ("a-0", "a-1", "b")),
        (("x/a", "y/a", "a-0"), ("a-0", "a-1", "a-0-2")),
        (("base+lora/chat",), ("chat",)),
    ],
)
def test_every_model_has_a_name_of_its_own(refs, names):
    assert model_names(refs) == names


def test_numbers_of_a_method_s_own():
    """Per model after the weight and the density; those of all models at the end."""
    g = genome(base_model="base", models=("a",), merge_method="della", layer_granularity=3)
    assert g.names[:3] == tuple(f"layers 0-2 · a{end}" for end in ("", " · density", " · epsilon"))
    sources = g.decode([0.5, 0.8, 0.5, 0.25, 0.3, 0.1]).slices
    settings = [piece.sources[0].parameters for piece in sources]
    assert settings[0] == {"weight": 0.5, "density": 0.8, "epsilon": 0.5 * (1 - 0.8)}
    assert settings[1] == {"weight": 0.25, "density": 0.3, "epsilon": 0.1 * 0.3}
    g = genome(base_model="base", models=("a", "b"), merge_method="ramplus_tl", filters=("mlp",))
    assert g.names[:3] == tuple(f"layers 0-5 · {key} · mlp" for key in ("r", "alpha", "epsilon"))
    assert g.names[3:] == tuple(f"layers 0-5 · {key} · rest" for key in ("r", "alpha", "epsilon"))
    (piece,) = g.decode([0.1, 0.2, 1e-4, 0.3, 0.4, 0.0]).to_dict()["slices"]
    assert piece["parameters"]["alpha"] == [
        {"filter": "mlp", "value": 0.2},
        {"filter": None, "value": 0.4},
    ]
    assert [list(source) for source in piece["sources"]] == [["layer_range", "model"]] * 3


@pytest.mark.parametrize("method", ["karcher", "model_stock", "arcee_fusion"])
def test_a_method_without_numbers_cannot_be_searched(method):
    with pytest.raises(ValueError, match="has no numbers that could be searched"):
        genome(base_model="base", models=("a", "b"), merge_method=method)


@pytest.mark.parametrize(("method", "count"), [("nearswap", 2), ("nuslerp", 3), ("passthrough", 2)])
def test_too_many_models_for_a_method(method, count):
    with pytest.raises(ValueError, match=f"not those of {method}, which merges exactly"):
        genome(base_model="base", models=("a", "b", "c")[:count], merge_method=method)


def test_densities_have_bounds_start_and_step_of_their_own():
    g = genome(
        base_model="base",
        models=("a",),
        merge_method="dare_linear",
        search={"bounds": (0.0, 4.0), "density_bounds": (0.2, 0.6)},
    )
    weight, density = g.genes
    assert (weight.low, weight.high, weight.start, weight.scale) == (0.0, 4.0, 1.0, 1.0)
    assert (density.low, density.high, density.start) == (0.2, 0.6, 0.4)
    assert density.scale == pytest.approx(0.1)
    assert genome(base_model="base", models=("a",), merge_method="ties").genes[1].start == 0.8


def test_the_study_bounds_a_method_s_own_numbers():
    section = {"base_model": "base", "models": ("a", "b"), "layer_granularity": 3}
    g = genome(
        {"parameter_bounds": {"gamma": (0.0, 0.1)}, "bounds": (0.0, 4.0)},
        merge_method="breadcrumbs",
        **section,
    )
    found = [gene for gene in g.genes if gene.name.endswith("gamma")]
    assert len(found) == 4
    assert {(gene.low, gene.high, gene.start) for gene in found} == {(0.0, 0.1, 0.01)}
    assert found[0].scale == pytest.approx(0.1 / 4)
    plain = genome({"bounds": (0.0, 4.0)}, merge_method="breadcrumbs", **section)
    assert {(n.low, n.high) for n in plain.genes if n.name.endswith("gamma")} == {(0.0, 0.2)}
    assert plain.names == g.names
    assert plain.shape == g.shape
    bounds = {"r": (0.5, 1.0), "epsilon": (0.0, 1e-4)}
    shared = genome({"parameter_bounds": bounds}, merge_method="ramplus_tl", **section)
    assert [(n.low, n.high, n.start) for n in shared.genes[:3]] == [
        (0.5, 1.0, 0.75),  # the middle: the default, 0.1, lies outside
        (0.0, 1.0, 0.2),
        (0.0, 1e-4, 1e-5),
    ]
    # the references start there too
    (_, merge), *_ = [item for item in shared.references([0.5]) if item[0] == "uniform"]
    assert merge == (0.75, 0.2, 1e-5) * 2


@pytest.mark.parametrize("n", range(2, 10))
def test_the_walk_takes_every_pair_once_with_the_fewest_jumps(n):
    edges = walk(n)
    assert sorted(tuple(sorted(edge)) for edge in edges) == list(
        itertools.combinations(range(n), 2)
    )
    jumps = sum(a[1] != b[0] for a, b in itertools.pairwise(edges))
    assert jumps == (0 if n % 2 else n // 2 - 1)  # n odd nodes need n / 2 trails (Euler)


@given(st.integers(2, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_slerp_gives_back_its_vector_bit_for_bit(n, data):
    models = tuple(f"m{i}" for i in range(n))
    g = genome(models=models, merge_method="slerp", layer_granularity=2)
    u = data.draw(vectors(g))
    back = []
    for piece in g.decode(u).to_dict()["slices"]:
        pair = [models.index(source["model"]) for source in piece["sources"]]
        assert piece["base_model"] == models[pair[0]]
        assert 0 <= piece["parameters"]["t"] <= 1
        back.append(walk(n).index(tuple(pair)) + piece["parameters"]["t"])
    assert back == list(u)


def test_slerp_of_two_is_t_and_the_base_comes_first():
    g = genome(base_model="base", models=("a",), merge_method="slerp")
    assert [(gene.low, gene.high, gene.start, gene.scale) for gene in g.genes] == [
        (0.0, 1.0, 0.5, 0.5)
    ]
    (piece,) = g.decode([0.25]).to_dict()["slices"]
    assert [s["model"] for s in piece["sources"]] == ["base", "a"]
    assert (piece["base_model"], piece["parameters"]) == ("base", {"t": 0.25})
    assert g.decode([1.0]).to_dict()["slices"][0]["parameters"] == {"t": 1.0}


def test_references():
    ties = genome(base_model="base", models=("a", "b"), merge_method="ties")
    assert ties.references([0.5]) == [
        ("parent", (0.0, 1.0, 0.0, 1.0)),
        ("parent", (1.0, 1.0, 0.0, 1.0)),
        ("parent", (0.0, 1.0, 1.0, 1.0)),
        ("uniform", (0.5, 0.8, 0.5, 0.8)),
        ("uniform", (1.0, 0.8, 1.0, 0.8)),
    ]
    assert [ties.is_uniform(v) for _, v in ties.references([0.5])] == [
        True,
        False,
        False,
        True,
        True,
    ]
    mean = genome(models=("a", "b"), merge_method="linear")
    assert mean.references([0.25, 1.25]) == [
        ("parent", (1.0, 0.0)),
        ("parent", (0.0, 1.0)),
        ("uniform", (0.5, 0.5)),
    ]
    line = genome(models=("a",), base_model="base", merge_method="linear")
    assert [v for _, v in line.references([0.25, 1.25])] == [(1.0, 0.0), (0.0, 1.0), (0.75, 0.25)]
    assert all(line.is_uniform(v) for _, v in line.references([0.25]))
    slerp = genome(models=("a", "b", "c"), merge_method="slerp")
    assert [v for _, v in slerp.references([0.5, 1.25])] == [
        (0.0,),
        (1.0,),
        (2.0,),
        (0.5,),
        (1.5,),
        (2.5,),
    ]


@given(genomes(), st.lists(st.floats(0, 2), max_size=3))
@settings(max_examples=60, deadline=None)
def test_every_reference_is_a_recipe(g, weights):
    references = g.references(weights)
    assert len(set(references)) == len(references)
    for role, vector in references:
        assert isinstance(g.decode(vector), Recipe)
        assert role == "parent" or g.is_uniform(vector)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(
    ("method", "smooth"),
    [
        *itertools.product([*DELTAS, "linear", "della", "breadcrumbs_ties", "ram"], [False, True]),
        ("slerp", False),
        ("nuslerp", True),
        ("multislerp", False),
        ("sce", True),
        ("ramplus_tl", False),
    ],
)
def test_parents_are_the_models_themselves(family, method, smooth):
    models = tuple(str(family / name) for name in ("one", "two"))
    section = GenomeSection(
        merge_method=method,
        base_model=str(family / "base"),
        models=models,
        layer_granularity=2,
        smooth=smooth,
    )
    study = Study(
        genome=section, tasks=(TaskSource(file="t.jsonl"),), search=SearchSection(dtype="float32")
    )
    g = make_genome(study, 4)
    for sibling, name in [(None, "base"), (0, "one"), (1, "two")]:
        recipe = g.decode(g.parent(sibling))
        plan, wanted = MergePlan(recipe, open_recipe(recipe)), load_all(family / name)
        for tensor in plan.names:
            assert (plan.merge(tensor) - wanted[tensor].float()).abs().max() < 1e-6, (name, tensor)


EVOLVE = """
import json, sys
import numpy as np
from mergekit.config import MergeConfiguration
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition

for line in sys.stdin:
    section, vector, ours = json.loads(line)
    genome = ModelGenome(ModelGenomeDefinition.model_validate(section))
    both = genome.genotype_merge_config(np.array(vector)), MergeConfiguration.model_validate(ours)
    print(json.dumps([config.model_dump(mode="json", exclude_none=True) for config in both]))
"""


def random_section(rng, models):
    """A genome that mergekit-evolve has too; `models` are folders with a configuration, the base
    first.
    """
    method = rng.choice(["task_arithmetic", "ties", "dare_ties", "linear", "slerp"])
    section = {
        "merge_method": method,
        "models": models[1 : rng.randint(2, 3) + (method == "linear")],
        "base_model": models[0],
    }
    if method == "linear":
        section |= rng.choice([{"base_model": None}, {"models": section["models"] + models[:1]}])
    if method == "slerp":
        section |= {"models": models[:2]} | rng.choice(
            [{"base_model": None}, {"base_model": models[0]}]
        )
    else:
        section |= {
            "smooth": rng.random() < 0.4,
            "filters": rng.choice([None, ["self_attn"], ["mlp", "self_attn"]]),
        }
        section |= {
            "allow_negative_weights": rng.random() < 0.4,
            "normalize": rng.choice([None, True, False]),
        }
    return section | {
        "layer_granularity": rng.choice([0, 1, 2, 3]),
        "tokenizer_source": rng.choice([None, "base", "union"]),
    }


def plain(config):
    """What both say in other words, said alike: sources by model, and layer ranges of whole models
    left out.
    """
    settings = {"normalize": bool(config.get("parameters", {}).get("normalize")), "t": None}
    pieces = []
    for piece in config.get("slices") or [{"sources": config["models"]}]:
        by_model = {s["model"]: s.get("parameters", {}) for s in piece["sources"]}
        pieces.append([by_model, [s.get("layer_range") for s in piece["sources"]]])
    # one t from the first model to the second, whichever of them is called the base
    if config["merge_method"] == "slerp":
        t = [piece["parameters"]["t"] for piece in config["slices"]]
        first = sorted(pieces[0][0])[0]
        settings = {
            "t": [
                x if s["base_model"] == first else 1 - x
                for x, s in zip(t, config["slices"], strict=True)
            ]
        }
        pieces = [[sorted(by_model), ranges] for by_model, ranges in pieces]
    else:
        settings["base_model"] = config.get("base_model")
    return [
        config["merge_method"],
        config["dtype"],
        config.get("tokenizer_source"),
        settings,
        pieces,
    ]


def test_a_vector_means_what_mergekit_evolve_reads_in_it(tmp_path):
    python = os.environ.get("EVOMERGE_MERGEKIT_PYTHON")
    if not python:
        pytest.skip("EVOMERGE_MERGEKIT_PYTHON names no Python with mergekit")
    models = [str(tmp_path / name) for name in ("base", "one", "two", "three")]
    for path in map(Path, models):
        path.mkdir()
        (path / "config.json").write_text(
            json.dumps({"model_type": "llama", "num_hidden_layers": LAYERS})
        )
    rng = random.Random(0)
    lines = []
    for _ in range(120):
        section = random_section(rng, models)
        lists = {key: tuple(value) for key, value in section.items() if isinstance(value, list)}
        g = genome(**section | lists)
        theirs = vector = [rng.uniform(gene.low, gene.high) for gene in g.genes]
        # theirs has a number per model, and t is the softmax of the larger two: at most one half
        if g.method == "slerp":
            theirs = [number for _ in vector for number in (rng.uniform(-1, 1), rng.uniform(-1, 1))]
            shares = [
                1 / (1 + math.exp(a - b)) for a, b in zip(theirs[::2], theirs[1::2], strict=True)
            ]
            first = g.models.index(section["models"][0])
            vector = [share if first == 0 else 1 - share for share in shares]
        lines.append(json.dumps([section, theirs, g.decode(vector).to_dict()]))
    out = subprocess.run(
        [python, "-c", EVOLVE], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    answers = out.stdout.splitlines()
    assert len(answers) == len(lines)
    for line, answer in zip(lines, answers, strict=True):
        theirs, ours = map(plain, json.loads(answer))
        t = [config[3].pop("t") for config in (ours, theirs)]
        assert ours == theirs, line
        assert t[0] == pytest.approx(t[1], abs=1e-6), line  # the softmax there has single precision


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("merge_method: ties, layer_granularity: 2, filters: [mlp]", {"base", "instruct"}),
        ("merge_method: dare_linear, smooth: true, layer_granularity: 2", {"base", "instruct"}),
        ("merge_method: slerp, layer_granularity: 2", {"base", "instruct"}),
        ("merge_method: della, layer_granularity: 2", {"base", "instruct"}),
        ("merge_method: nearswap, filters: [mlp]", {"base", "instruct"}),
        ("merge_method: ramplus_tl, smooth: true, layer_granularity: 2", {"base", "instruct"}),
        ("merge_method: multislerp, layer_granularity: 2", {"base", "instruct"}),
    ],
)
def test_a_search_over_it_reaches_a_verdict(pair, tmp_path, capsys, kind, names):
    run(pair, tmp_path, f"base_model: {pair}/base, models: [{pair}/instruct], {kind}")
    found = set(verdict(tmp_path, capsys)["candidates"])
    assert found - {"found"} == {"winner", "uniform", *names}  # "found" where a reference wins


def test_a_search_of_one_model_reaches_a_verdict(pair, tmp_path, capsys):
    run(pair, tmp_path, f"models: [{pair}/instruct], merge_method: passthrough")
    found = set(verdict(tmp_path, capsys)["candidates"])
    assert found - {"found"} == {"winner", "uniform", "instruct"}


def test_a_search_without_a_base_reaches_a_verdict(pair, tmp_path, capsys):
    run(
        pair,
        tmp_path,
        f"models: [{pair}/base, {pair}/instruct], merge_method: linear, layer_granularity: 2",
    )
    found = set(verdict(tmp_path, capsys)["candidates"])
    assert found - {"found"} == {"winner", "uniform", "sibling:base", "sibling:instruct"}


def run(pair, folder, section):
    text = (pair / "study.yaml").read_text(encoding="utf-8").splitlines()
    text = [f"genome: {{{section}}}" if line.startswith("genome:") else line for line in text]
    (folder / "study.yaml").write_text(
        "\n".join(text).replace("tasks.jsonl", f"{pair}/tasks.jsonl"), encoding="utf-8"
    )
    url = f"sqlite:///{folder}/s.db"
    assert (
        main(
            [
                "search",
                str(folder / "study.yaml"),
                "--storage",
                url,
                "--results",
                str(folder / "r"),
                "--trials",
                "4",
            ]
        )
        == 0
    )


def verdict(folder, capsys):
    capsys.readouterr()
    assert main(["show", "tiny", "--json", "--storage", f"sqlite:///{folder}/s.db"]) == 0
    return json.loads(capsys.readouterr().out)["verdict"]
