"""Versions of judges are part of stored studies and of cache keys: a new one forgets old grades."""

import math
from hashlib import sha256
from types import SimpleNamespace

import numpy as np

from evomerge.judging.cascade import CascadeJudge
from evomerge.judging.learned import features
from evomerge.judging.learned.judge import Facts, JudgeWeights, LearnedJudge, save_judge, task_key
from evomerge.judging.llm.judge_prompt import Rubric
from evomerge.judging.local import TEMPLATE, LocalJudge
from evomerge.judging.rules.judge import RulesJudge
from evomerge.tasks import Task


class Engine:
    """An engine that finds all continuations equally likely."""

    context, fingerprint = None, "print"

    def tokenizer(self, text):
        return {"input_ids": []}

    tokenizer.chat_template = None

    def loglikelihood(self, pairs):
        return [math.log(0.2)] * len(pairs)

    def length(self, prompt):
        return len(prompt)

    def can_write(self, prompt, continuation):
        return True


def judge(name, version):
    return SimpleNamespace(name=name, version=version)


def test_rules():
    assert (RulesJudge.name, RulesJudge.version) == ("rules", "2")


def test_learned(tmp_path):
    task, m = Task(0, "1+1は？", "2", ""), len(features.NAMES)
    pair = np.zeros((2, 1, m), np.float32)
    weights = JudgeWeights(
        idf=np.zeros(1 << features.BITS, np.float32),
        grams=np.zeros((1, 1 << features.BITS), np.float32),
        measures=np.zeros((1, m), np.float32),
        mean=pair,
        scale=pair + 1,
        bias=pair[:, :, 0] + 3,
        asks_english=np.zeros(1, bool),
    )
    path = tmp_path / "judge.npz"
    save_judge(path, weights, Facts((task_key(task),), ("0",), (5,), ("j",), ("m",)))
    learned = LearnedJudge(path)
    digest = sha256(path.read_bytes()).hexdigest()[:12]
    assert features.VERSION == "3+rules-2"
    assert (learned.name, learned.version) == ("learned", f"3+rules-2-{digest}")
    assert task_key(task) == "38dfad859b084f0f"


def test_local():
    assert LocalJudge(Engine(), "folder/tiny").name == "local:tiny"
    assert LocalJudge(Engine(), "folder/tiny").version == "80717ca12169"
    assert LocalJudge(Engine(), "tiny", "{input} {answer}").version == "8ecde5ecae43"


def test_rubrics():
    digests = [Rubric(*given).digest[:16] for given in ((), (TEMPLATE,), ("{input} {answer}",))]
    assert digests == ["828a7d65f6c7b6e3", "b63ef8e53a24290f", "c52200e94cfd36e1"]


def test_cascade():
    cascade = CascadeJudge(judge("learned", "3+rules-2-abc"), judge("llm:m", "123"), 0.1)
    assert (cascade.name, cascade.version) == ("cascade:llm:m", "20f133ebdf03")
