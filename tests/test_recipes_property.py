"""Random mergekit configurations: read and written without loss, and merged by us and by mergekit
to the same bits.

EVOMERGE_SEEDS=FIRST:LAST runs other configurations than the 36 that always run.
"""

import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mergekit_server import MergekitError, mergekit
from merging_tools import differing, load_all
from recipe_cases import Writer, drawn_elsewhere, make_families

from evomerge.errors import RecipeError
from evomerge.merging.build import build_model
from evomerge.recipe import Recipe, read_recipe

FIRST, LAST = map(int, os.environ.get("EVOMERGE_SEEDS", "0:36").split(":"))
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    make_families(folder)
    return folder


def merge_both(data, folder, seed):
    """(our tensors, mergekit's) of one configuration; the number of layers is the same in both
    config.json.
    """
    recipe = Recipe.from_dict(data)
    build_model(recipe, folder / "ours", random_seed=seed)
    mergekit().merge(recipe.to_yaml(), folder / "theirs", seed)
    layers = [
        json.loads((folder / side / "config.json").read_text())["num_hidden_layers"]
        for side in ("ours", "theirs")
    ]
    assert layers[0] == layers[1]
    return load_all(folder / "ours"), load_all(folder / "theirs")


@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_a_random_configuration(families, tmp_path, seed):
    mergekit()
    data = Writer(seed, families).configuration()
    try:
        ours, theirs = merge_both(data, tmp_path, seed)
    except RecipeError as error:
        refused = str(error)
    else:
        excused = drawn_elsewhere(Recipe.from_dict(data))
        # fp16: see test_methods
        excused |= {
            n for n, t in theirs.items() if not t.isfinite().all() and ours[n].isfinite().all()
        }
        assert ours.keys() == theirs.keys()
        assert not set(differing(ours, theirs)) - excused
        return
    assert "weights sum to 0" in refused
    mergekit().merge(yaml.safe_dump(data), tmp_path / "theirs", seed)
    assert not all(t.isfinite().all() for t in load_all(tmp_path / "theirs").values())


def pieces(families, *slices, method="task_arithmetic"):
    """A configuration from slices of (model, first layer, last layer)."""
    sources = [
        {
            "sources": [
                {"model": str(families / "tied" / m), "layer_range": [a, b]} for m, a, b in piece
            ]
        }
        for piece in slices
    ]
    top = {"weight": 0.5, "density": 0.5}
    return {
        "merge_method": method,
        "base_model": str(families / "tied/base"),
        "slices": sources,
        "parameters": top,
        "dtype": "bfloat16",
    }


def test_dare_on_layers_in_another_order(families, tmp_path):
    swapped = [[("one", a, a + 1), ("base", a, a + 1)] for a in (3, 1)]
    ours, theirs = merge_both(pieces(families, *swapped, method="dare_linear"), tmp_path, 5)
    assert not differing(ours, theirs)


def test_a_last_slice_with_more_models(families, tmp_path):
    """mergekit cuts the final norm's and the head's models to as many as the first slice has, and
    fails where it cuts the base.
    """
    first, last = [("one", 0, 2), ("base", 0, 2)], [("one", 2, 4), ("two", 2, 4), ("base", 2, 4)]
    with pytest.raises(MergekitError, match="Base input is not present"):
        merge_both(pieces(families, first, last), tmp_path / "fails", 0)
    ours, theirs = merge_both(
        pieces(families, first, [last[0], last[2], last[1]]), tmp_path / "cuts", 0
    )
    assert differing(ours, theirs) == ["model.norm.weight"]


WRONG = [
    ("weight", v)
    for v in (
        "0x10",
        "５",
        "1__0",
        "",
        "True",
        None,
        [1, None],
        [[1]],
        [{"filter": "mlp", "value": 1}, 2],
    )
]
WRONG += [("normalize", v) for v in (2, 0.5, " yes ", "1.0", "", None, [0, 0.5])]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_what_mergekit_cannot_read_is_refused(families, tmp_path, key, value):
    one = {"model": str(families / "tied/one"), "parameters": {"weight": 1.0, key: value}}
    data = {
        "merge_method": "task_arithmetic",
        "base_model": str(families / "tied/base"),
        "models": [one],
        "parameters": {key: value},
    }
    with pytest.raises(RecipeError, match=key):
        Recipe.from_dict(data)
    with pytest.raises(MergekitError, match=r"[Vv]alid"):
        mergekit().merge(yaml.safe_dump(data), tmp_path / "theirs")


def test_layers_under_models_are_read_over():
    """As in mergekit, which merges all layers; a note names them."""
    models = [
        {"model": name, "layer_range": [0, 2], "parameters": {"weight": 1}}
        for name in ("base", "one")
    ]
    recipe = Recipe.from_dict(
        {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    )
    assert [source.layers for source in recipe.slices[0].sources] == [None, None]
    assert "models[0], `layer_range`" in recipe.unread
    assert "models[1], `layer_range`" in recipe.unread


def strict(data):
    """JSON in which 1, 1.0, true and "1" differ, and every bit of a float shows."""
    return json.dumps(data, sort_keys=True)


NUMBERS = st.floats(-6e4, 6e4) | st.sampled_from(
    [1e-300, 5e-324, 2.5e-310, -0.0, 0.1 + 0.2, 1 / 3, 1.7976931348623157e-305, 1e-5]
)
LINE_BREAKS = "\x85\u2028\u2029"  # PyYAML writes these as they are, and reads a space
UNUSABLE = LINE_BREAKS + "\0"  # no path holds a NUL, and reading refuses it
NAMES = st.text(st.characters(codec="utf-8", exclude_characters=UNUSABLE), min_size=1, max_size=12)


@st.composite
def configurations(draw, names=NAMES):
    """A Writer's configuration with other weights, models' names and order of keys."""
    data = Writer(draw(st.integers(0, 2**32)), NoFolder()).configuration()
    renamed = dict(
        zip(
            ("base", "one", "two", "three"),
            draw(st.lists(names, min_size=4, max_size=4, unique=True)),
            strict=True,
        )
    )

    def mixed(value, key=None):
        if isinstance(value, dict):
            return {k: mixed(value[k], k) for k in draw(st.permutations(sorted(value)))}
        if isinstance(value, list):
            return [mixed(item, key) for item in value]
        if isinstance(value, float) and key in ("weight", "lambda", "t"):
            return draw(NUMBERS)
        return renamed[value.split("/")[-1]] if key in ("model", "base_model") else value

    return mixed(data)


class NoFolder:
    """Stands for a folder of models: its paths end in the model's name."""

    def __truediv__(self, name):
        return name if name in ("base", "one", "two", "three") else self


@QUICK
@given(configurations())
def test_a_recipe_survives_writing_and_reading(tmp_path_factory, data):
    recipe = Recipe.from_dict(data)
    path = tmp_path_factory.getbasetemp() / "recipe.yml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = read_recipe(path)
    assert strict(recipe.to_dict()) == strict(again.to_dict()) == strict(data)
    assert (again.slices, again.parameters, again.models) == (
        recipe.slices,
        recipe.parameters,
        recipe.models,
    )
    assert again.digest() == recipe.digest()


def plain(value):
    """mergekit's objects as a configuration: no key that is None, a model as its path."""
    if isinstance(value, dict):
        if "path" in value.get("model", {}):
            return value["model"]["path"]
        return {k: plain(v) for k, v in value.items() if v is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


def test_mergekit_reads_what_we_write():
    mergekit()

    @QUICK
    @given(configurations(st.text(st.characters(categories=["L", "Nd"]), min_size=1)))
    def check(data):
        assert strict(plain(mergekit().read(Recipe.from_dict(data).to_yaml()))) == strict(
            plain(data)
        )

    check()
