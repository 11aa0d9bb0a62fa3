"""lm-eval tasks in place: the same values as lm-eval itself finds on a merged folder, and a study
from end to end.
"""

import importlib.util
import json
import os
import shutil
import subprocess

import pytest
import yaml

import evomerge
from evomerge.answering.lm_eval.documents import LmEvalTasks
from evomerge.answering.lm_eval.harness import LmEvalRunner
from evomerge.cli import main
from evomerge.console import Console
from evomerge.errors import InputError, StudyError, StudyFileError, TaskError
from evomerge.genome.genome import make_genome
from evomerge.merging.build import build_model
from evomerge.searching.open_search import open_search
from evomerge.searching.samplers.make_sampler import make_sampler
from evomerge.study import read_study

lm_eval = pytest.importorskip("lm_eval")
KANA = "あいうえおかきくけこ"


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """A mergekit-evolve configuration beside its own lm-eval tasks: choices, generation and a group
    of two.
    """
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "tasks").mkdir()
    rows = [
        {
            "q": KANA[i % 10] + KANA[3 * i % 10],
            "choices": [KANA[i % 7], KANA[(i + 3) % 10], "12"],
            "gold": i % 3,
        }
        for i in range(23)
    ]
    for name, part in (("docs", rows), ("shots", rows[:5]), ("few", rows[5:12])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
        )

    def task(name, docs, **config):
        files = {"test": str(folder / f"{docs}.jsonl"), "train": str(folder / "shots.jsonl")}
        data = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
        }
        data |= {"training_split": "train", "fewshot_split": "train", "doc_to_text": "{{q}}:"}
        (folder / "tasks" / f"{name}.yaml").write_text(
            yaml.safe_dump(data | config, allow_unicode=True), encoding="utf-8"
        )

    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
    }
    metrics = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
    ]
    task("tiny_choice", "docs", **choice, metric_list=metrics)
    task("tiny_few", "few", **choice, metric_list=metrics)
    strict = {
        "name": "strict-match",
        "filter": [
            {"function": "regex", "regex_pattern": "(.)", "group_select": 0},
            {"function": "take_first"},
        ],
    }
    task(
        "tiny_generate",
        "docs",
        output_type="generate_until",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[strict],
    )
    group = {"group": "tiny_group", "task": ["tiny_choice", "tiny_few"]}
    (folder / "tasks" / "group.yaml").write_text(
        yaml.safe_dump(
            group | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
        ),
        encoding="utf-8",
    )
    config = {
        "genome": {
            "models": [str(pair / "instruct")],
            "merge_method": "task_arithmetic",
            "base_model": str(pair / "base"),
        },
        "tasks": [
            {"name": "tiny_choice", "weight": 1.0, "metric": "acc_norm,none"},
            {"name": "tiny_generate", "weight": 3.0, "metric": "exact_match,strict-match"},
        ],
        "num_fewshot": 1,
        "task_search_path": "./tasks",
    }
    config["genome"]["layer_granularity"] = 2
    (folder / "study.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


SMALL = [
    "search.dtype=float32",
    "search.trials=5",
    "search.population=4",
    "search.uniform=[0.5]",
    "engine.batch_size=8",
]


def opened(folder, tmp_path, *overrides, name="study.yaml"):
    study = read_study(folder / name, [*SMALL, *overrides])
    return open_search(study, f"sqlite:///{tmp_path}/s.db", Console())


def reference(folder, merged, names, metrics, fewshot=1, **settings):
    """lm-eval's own values: task -> doc_id -> "metric,filter" -> value, and its results."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(merged), dtype="float32", batch_size=8, device="cpu")
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    settings = {"apply_chat_template": True, "fewshot_as_multiturn": True} | settings
    out = lm_eval.simple_evaluate(
        model, tasks=names, num_fewshot=fewshot, task_manager=manager, bootstrap_iters=0, **settings
    )
    values = {}
    for name, samples in out["samples"].items():
        for s in samples:
            found = {
                f"{m},{s['filter']}": float(s[m])
                for m in s["metrics"]
                if f"{m},{s['filter']}" in metrics
            }
            values.setdefault(name, {}).setdefault(s["doc_id"], {}).update(found)
    return values, out["results"]


@pytest.mark.parametrize("chat", [True, False])
def test_in_place_values_are_those_of_a_merged_folder(folder, tmp_path, chat):
    settings = [f"apply_chat_template={str(chat).lower()}"]
    with opened(folder, tmp_path, *settings) as search:
        recipe = search.genome.decode([0.7, 1.2])
        tasks = search.evaluator.runner.lm_eval.tasks
        # what was live before must not matter
        search.evaluator.evaluate(search.genome.decode([0.1, 1.9]), [tasks])
        outcomes = search.evaluator.runner.evaluate(
            recipe.digest(),
            tasks,
            search.evaluator.cache,
            lambda: search.evaluator.engine.apply(recipe),
            lambda n: None,
        )
        score = sum(search.evaluator.runner.lm_eval.scores(tasks, outcomes)) / len(tasks)
    build_model(recipe, tmp_path / "merged")
    metrics = ("acc_norm,none", "exact_match,strict-match")
    values, results = reference(
        folder,
        tmp_path / "merged",
        ["tiny_choice", "tiny_generate"],
        metrics,
        apply_chat_template=chat,
    )
    ours = {str(t.task_id): o.values for t, o in zip(tasks, outcomes, strict=True)}
    theirs = {f"{name}/{i}": found for name, docs in values.items() for i, found in docs.items()}
    assert ours == theirs
    assert len({tuple(v.values()) for v in ours.values()}) > 1, (
        "every document has the same value: nothing is shown"
    )
    expected = (
        results["tiny_choice"]["acc_norm,none"]
        + 3 * results["tiny_generate"]["exact_match,strict-match"]
    ) / 4
    assert score == pytest.approx(expected)


@pytest.mark.parametrize("start", ["か", "<think>"])
def test_metrics_see_the_answers_of_a_model_that_thinks(pair, folder, tmp_path, start):
    """The marks and the stop string are what untrained models write; <think> ends the prompt."""
    end, stop, opened_by_prompt = "9", "7", start == "<think>"
    data = yaml.safe_load((folder / "tasks/tiny_generate.yaml").read_text(encoding="utf-8"))
    for name, until in (("thinking", [stop]), ("raw", ["never"])):
        asked = {"until": until, "max_gen_toks": 24, "do_sample": False}
        own = data | {"task": name, "generation_kwargs": asked, "filter_list": None}
        del own["filter_list"]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    for name in ("base", "instruct"):
        shutil.copytree(pair / name, tmp_path / name)
        if opened_by_prompt:
            template = tmp_path / name / "chat_template.jinja"
            template.write_text(
                template.read_text(encoding="utf-8") + "<think>\n", encoding="utf-8"
            )
    settings = [
        f"genome.base_model={tmp_path}/base",
        f"genome.models=[{tmp_path}/instruct]",
        f"task_search_path={tmp_path}",
        "tasks=[{name: thinking, metric: 'exact_match,none'}]",
        f"generation.reasoning={{start: {start}, end: '{end}'}}",
        "num_fewshot=0",
    ]
    found = evomerge.check(folder / "study.yaml", overrides=[*SMALL, *settings])
    assert [f.text for f in found if f.subject == "reasoning"] == [
        f"thoughts are between {start} and {end}"
    ]
    with opened(folder, tmp_path, *settings) as search:
        recipe = search.genome.decode([0.7, 1.2])
        runner = search.evaluator.runner
        search.evaluator.engine.apply(recipe)
        outcomes = runner.run("thinking", list(range(23)))
    build_model(recipe, tmp_path / "merged")
    raw = replies(tmp_path, tmp_path / "merged", "raw")
    wanted = []
    thinking = [opened_by_prompt or text.startswith(start) for text in raw]
    for text, thinks in zip(raw, thinking, strict=True):
        if not thinks:  # an end that nothing has begun ends thoughts, unless the reply ends before
            text = text.split(stop)[0]
        answer = text.partition(end)[2].lstrip() if thinks or end in text else text
        wanted.append(answer.split(stop)[0])
    assert [outcome.answer.text for outcome in outcomes] == wanted
    # a stop string within thoughts, and thoughts without an end
    began = [text for text, thinks in zip(raw, thinking, strict=True) if thinks]
    assert any(stop in text.partition(end)[0] for text in began if end in text)
    assert any(end not in text for text in raw)
    theirs = replies(tmp_path, tmp_path / "merged", "thinking", think_end_token=end)
    assert any(a != b for a, b in zip(theirs, wanted, strict=True))


def replies(folder, merged, name, **settings):
    """lm-eval's own responses by document."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(merged), dtype="float32", batch_size=8, device="cpu", **settings)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out = lm_eval.simple_evaluate(
        model,
        tasks=[name],
        num_fewshot=0,
        task_manager=manager,
        bootstrap_iters=0,
        apply_chat_template=True,
    )
    samples = sorted(out["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def test_a_group_s_metric_and_the_same_task_twice(folder, tmp_path):
    tasks = (
        "tasks=[{name: tiny_group, metric: 'acc,none'}, {name: tiny_choice, metric: "
        "'acc_norm,none', weight: -0.5}]"
    )
    with opened(folder, tmp_path, tasks, "limit=9", "num_fewshot=0") as search:
        recipe = search.genome.decode([0.7, 1.2])
        documents = search.evaluator.runner.lm_eval.tasks
        examined = search.evaluator.evaluate(recipe, [documents])
    assert sorted({t.task_id for t in documents}) == sorted(
        [*(f"tiny_choice/{i}" for i in range(9)), *(f"tiny_few/{i}" for i in range(7))]
    )
    build_model(recipe, tmp_path / "merged")
    results = reference(folder, tmp_path / "merged", ["tiny_group"], (), fewshot=0, limit=9)[1]
    expected = (
        results["tiny_group"]["acc,none"] - 0.5 * results["tiny_choice"]["acc_norm,none"]
    ) / 1.5
    assert sum(g.value for g in examined.grades) / len(documents) == pytest.approx(expected)


def test_a_group_without_weights_by_size(folder, tmp_path):
    data = {
        "group": "flat",
        "task": ["tiny_choice", "tiny_few"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "flat.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    paths = f"task_search_path=[{folder}/tasks, {tmp_path}/own]"
    with opened(folder, tmp_path, "tasks=[flat]", paths) as search:
        recipe = search.genome.decode([0.7, 1.2])
        documents = search.evaluator.runner.lm_eval.tasks
        grades = search.evaluator.evaluate(recipe, [documents]).grades
        outcomes = search.evaluator.runner.evaluate(
            recipe.digest(),
            documents,
            search.evaluator.cache,
            lambda: pytest.fail("paid twice"),
            lambda n: None,
        )
    means = []
    for name in ("tiny_choice", "tiny_few"):
        own = [
            o.values["acc,none"] for t, o in zip(documents, outcomes, strict=True) if t.kind == name
        ]
        means.append(sum(own) / len(own))
    assert sum(g.value for g in grades) / len(documents) == pytest.approx(sum(means) / 2)


def test_a_study_from_end_to_end(folder, tmp_path, capsys, monkeypatch):
    """It is cut off twice, goes on, pays nothing twice, and its verdict is lm-eval's on the
    held-out documents.
    """
    storage = f"sqlite:///{tmp_path}/s.db"
    command = [
        "search",
        str(folder / "study.yaml"),
        "--storage",
        storage,
        "--results",
        str(tmp_path / "results"),
    ]
    command += [word for value in [*SMALL, "num_fewshot=0"] for word in ("--set", value)]
    run, runs = LmEvalRunner.run, []

    def cut(self, name, numbers):
        if len(runs) in (5, 12):  # between the two tasks of a candidate, and between two candidates
            runs.append(None)
            raise KeyboardInterrupt
        result = run(self, name, numbers)
        runs.append(
            (
                name,
                tuple(numbers),
                repr(
                    sorted(
                        (n, float(p.detach().double().sum()))
                        for n, p in self.lm.model.named_parameters()
                    )
                ),
            )
        )
        return result

    monkeypatch.setattr(LmEvalRunner, "run", cut)
    assert [main(command) for _ in range(3)] == [130, 130, 0]
    paid = [entry for entry in runs if entry is not None]
    assert len(paid) == len(set(paid)) > 12
    assert "held-out" in capsys.readouterr().out
    count = len(runs)
    assert main(command) == 0
    assert len(runs) == count
    verdict = json.loads((tmp_path / "results/study/verdict.json").read_text(encoding="utf-8"))
    assert verdict["metric"] == "score"
    assert set(verdict["paired"]) == {"winner-base", "winner-instruct", "winner-uniform"}
    with opened(folder, tmp_path, "num_fewshot=0") as search:
        held_out, searched = search.split.held_out, search.split.search
    assert (
        {t.kind for t in held_out} == {t.kind for t in searched} == {"tiny_choice", "tiny_generate"}
    )
    assert not {t.task_id for t in held_out} & {t.task_id for t in searched}
    assert main(["export", "study", "--storage", storage, "--model", str(tmp_path / "winner")]) == 0
    names = ("tiny_choice", "tiny_generate")
    samples = {
        name: sorted(int(t.task_id.split("/")[1]) for t in held_out if t.kind == name)
        for name in names
    }
    results = reference(folder, tmp_path / "winner", list(names), (), fewshot=0, samples=samples)[1]
    expected = (
        results["tiny_choice"]["acc_norm,none"]
        + 3 * results["tiny_generate"]["exact_match,strict-match"]
    ) / 4
    assert verdict["candidates"]["winner"]["mean"] == pytest.approx(expected)
    page = (tmp_path / "results/study/report.html").read_text(encoding="utf-8")
    assert "weighted mean of lm-eval" in page
    assert main(["check", str(folder / "study.yaml")]) == 0
    assert "23 to search on, 23 held out" in capsys.readouterr().out


def test_limit_and_shuffle_take_the_same_documents_for_all(folder):
    def documents(*overrides):
        return LmEvalTasks(
            read_study(folder / "study.yaml", ["tasks=[tiny_choice]", *overrides])
        ).documents["tiny_choice"]

    assert documents("limit=6") == list(range(6))
    drawn = documents("limit=6", "shuffle=true")
    assert drawn == documents("limit=6", "shuffle=true") != list(range(6))
    assert len(set(drawn)) == 6
    assert documents("limit=6", "shuffle=true", "split.seed=1") != drawn
    assert documents("limit=100", "shuffle=true") == list(range(23))


def test_random_init_draws_the_start(folder):
    starts = []
    for seed in (0, 0, 1):
        study = read_study(folder / "study.yaml", ["random_init=true", f"search.seed={seed}"])
        starts.append(make_sampler(study, make_genome(study, 4)).default.mean.tolist())
    assert starts[0] == starts[1] != starts[2]
    assert all(0 <= x <= 2 for x in starts[0])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tasks=[tiny_chioce]"], ["'tiny_chioce'", "tiny_choice"]),
        (["tasks=[{name: tiny_choice, metric: bleu}]"], ["'bleu'", "acc,none, acc_norm,none"]),
        (
            ["tasks=[{name: tiny_corpus, metric: 'f1,none'}]"],
            ["not a mean over documents", "'f1,none'"],
        ),
        (["limit=2", "split.held_out=0.1"], ["too few documents", "limit"]),
        (["tasks=[tiny_broken]"], ["tiny_broken", "cannot be loaded"]),
    ],
)
def test_bad_tasks_are_named_in_one_line(folder, tmp_path, overrides, words):
    own = tmp_path / "own"
    own.mkdir()
    data = yaml.safe_load((folder / "tasks/tiny_choice.yaml").read_text(encoding="utf-8"))
    corpus = data | {
        "task": "tiny_corpus",
        "metric_list": [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}],
    }
    broken = data | {
        "task": "tiny_broken",
        "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}},
    }
    for task in (corpus, broken):
        (own / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    paths = f"task_search_path=[{folder}/tasks, {own}]"
    with pytest.raises(TaskError) as caught, opened(folder, tmp_path, paths, *overrides):
        pass
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_model_without_a_chat_template(pair, folder, tmp_path):
    shutil.copytree(pair / "base", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    base = f"genome.base_model={tmp_path}/base"
    with (
        pytest.raises(TaskError, match="apply_chat_template: false"),
        opened(folder, tmp_path, base),
    ):
        pass
    with opened(folder, tmp_path, base, "apply_chat_template=false", "study=other") as search:
        assert search.evaluator.runner.lm_eval.tasks


def test_what_changed_under_a_study_is_refused(folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder / "tasks", own)
    path = f"task_search_path={own}"
    with opened(folder, tmp_path, path) as search:
        search.run()  # before a trial is done, a study would begin again
    shots = folder / "shots.jsonl"
    kept = shots.read_text(encoding="utf-8")
    try:
        shots.write_text(
            kept.replace('"12"', '"11"').replace('"q": "', '"q": "0'), encoding="utf-8"
        )
        with pytest.raises(StudyError, match="the prompts"), opened(folder, tmp_path, path):
            pass
    finally:
        shots.write_text(kept, encoding="utf-8")
    config = own / "tiny_choice.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(
        text.replace("target_delimiter: ''", "target_delimiter: ' '"), encoding="utf-8"
    )
    with pytest.raises(StudyError, match="the tasks"), opened(folder, tmp_path, path):
        pass


def test_without_lm_eval_the_extra_is_named(folder, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "lm_eval" else find(name, *rest),
    )
    with (
        pytest.raises(InputError, match=r"pip install 'evomerge\[lm-eval\]'"),
        opened(folder, tmp_path),
    ):
        pass


EXAMPLE = """
genome:
  models: [org/a, org/b+org/adapter]
  merge_method: dare_ties
  base_model: org/base
  tokenizer_source: union
  layer_granularity: 8
  allow_negative_weights: true
  normalize: false
  filters: [self_attn]
tasks:
  - gsm_custom
  - {name: quiz, weight: -0.5, metric: "exact_match,strict-match"}
limit: 100
num_fewshot: 3
shuffle: true
random_init: true
"""
KEYS = (
    "limit",
    "num_fewshot",
    "shuffle",
    "random_init",
    "apply_chat_template",
    "fewshot_as_multiturn",
)


@pytest.mark.skipif(
    not os.environ.get("EVOMERGE_MERGEKIT_PYTHON"),
    reason="EVOMERGE_MERGEKIT_PYTHON names no Python with mergekit",
)
def test_mergekit_evolve_reads_its_files_the_same_way(tmp_path):
    extras = ("", "apply_chat_template: false\nfewshot_as_multiturn: false\n")
    paths = [tmp_path / f"{i}.yaml" for i in range(len(extras))]
    for path, extra in zip(paths, extras, strict=True):
        path.write_text(EXAMPLE + extra, encoding="utf-8")
    code = (
        "import json, sys, yaml; from mergekit.evo.config import EvolMergeConfiguration as C; "
        "print(json.dumps([C.model_validate(yaml.safe_load(open(path))).model_dump(mode='json') "
        "for path in sys.argv[1:]]))"
    )
    run = [os.environ["EVOMERGE_MERGEKIT_PYTHON"], "-c", code, *map(str, paths)]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    for path, theirs in zip(paths, json.loads(out.stdout.splitlines()[-1]), strict=True):
        ours = read_study(path).to_dict()
        assert {key: ours[key] for key in KEYS} == {key: theirs[key] for key in KEYS}
        assert [
            {key: task[key] for key in ("name", "weight", "metric")} for task in ours["tasks"]
        ] == theirs["tasks"]
        # a model is an object there
        plain = [key for key in theirs["genome"] if "model" not in key]
        assert {key: ours["genome"][key] for key in plain} == {
            key: theirs["genome"][key] for key in plain
        }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("judge: {metric: grade}", ["`judge`", "bring their own"]),
        ("generation: {max_new_tokens: 5}", ["`generation`"]),
        ("generation: {max_new_tokens: 5, reasoning: null}", ["max_new_tokens", "reasoning"]),
        ("engine: {kind: vllm}", ["transformers"]),
        ("task_search_path: nowhere", ["nowhere", "task_search_path"]),
        ("limit: 1", ["`limit`"]),
        ("search: {start: 0.5}", ["random_init"]),
    ],
)
def test_what_lm_eval_tasks_cannot_have_is_refused(tmp_path, text, words):
    data = yaml.safe_load(EXAMPLE) | yaml.safe_load(text)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(StudyFileError) as caught:
        read_study(tmp_path / "s.yaml")
    for word in words:
        assert word in str(caught.value)


def test_files_and_lm_eval_tasks_do_not_mix(pair, tmp_path):
    for override in (
        "tasks=[{file: tasks.jsonl}, quiz]",
        "tasks=[{file: tasks.jsonl, weight: 2}]",
        "limit=5",
    ):
        with pytest.raises(StudyFileError, match="lm-eval"):
            read_study(pair / "study.yaml", [override])


@pytest.mark.parametrize("name", ["tasks.jsonl", "data/Tasks.XLSX"])
def test_a_file_s_plain_path_is_no_lm_eval_task(pair, name):
    with pytest.raises(StudyFileError, match=r"tasks\[0\].*{file: …}") as caught:
        read_study(pair / "study.yaml", [f"tasks=[{name}]"])
    assert name in str(caught.value)
