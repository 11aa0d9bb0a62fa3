"""A task's class by a language model: how likely it finds each class's name as the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from evomerge.errors import ModelError
from evomerge.knowledge.records import Knowledge
from evomerge.knowledge.retrieval.interface import Matrix

Loglikelihood = Callable[[Sequence[tuple[str, str]]], list[float]]

# Zhao et al. 2021, section 5: their probabilities are averaged
CONTENT_FREE = ("N/A", "[MASK]", "")
# characters of a task that are shown: its request is at its beginning or end
LONGEST = 1000
# tasks in one request, so that the texts of 10,000 are never in memory together
TOGETHER = 64
# share of the votes that every class keeps in `both`, so that one without a neighbour stays
# possible
LEAST = 0.01

JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
ASKED_JA = (
    "次の課題は、下の種類のどれに当たりますか。種類の名前だけを答えてください。\n\n"
    "種類:\n{classes}\n\n課題:\n{task}"
)
ASKED = (
    "Which of these classes does the task belong to? Answer with the name of the class alone.\n\n"
    "Classes:\n{classes}\n\nTask:\n{task}"
)


class ModelClassifier:
    """Likelihoods of class names with contextual calibration.

    Zhao et al. 2021, "Calibrate Before Use": share(c) = softmax over c of log P(c | question about
    the task) - log P_free(c), where P_free is the mean share of c for tasks without content; so
    neither short names nor those that the model prefers anyway gain. `loglikelihood` gives
    log P(continuation | prompt) in nats, `render` the whole prompt of a text
    (answering/prompts.py). Raises ModelError for a likelihood that is not a number.
    """

    def __init__(
        self, knowledge: Knowledge, loglikelihood: Loglikelihood, render: Callable[[str], str]
    ) -> None:
        self.names = [c.name for c in knowledge.classes]
        lines = []
        for c in knowledge.classes:
            description = c.description.strip()
            if description:
                lines.append(f"- {c.name}: {description}")
            else:
                lines.append(f"- {c.name}")
        self.classes = "\n".join(lines)
        self.asked = ASKED_JA if JAPANESE.search(self.classes) else ASKED
        self.loglikelihood = loglikelihood
        self.render = render
        self.free: Matrix | None = None  # log P_free, (classes,)

    def shares(self, texts: Sequence[str]) -> Matrix:
        """(texts, classes), rows that sum to 1."""
        if not texts:
            return np.empty((0, len(self.names)))
        if self.free is None:
            self.free = np.log(softmax(self._likelihoods(CONTENT_FREE)).mean(0))
        found = [self._likelihoods(texts[i : i + TOGETHER]) for i in range(0, len(texts), TOGETHER)]
        return softmax(np.concatenate(found) - self.free)

    def question(self, text: str) -> str:
        """What the model is asked about one task, before it is rendered."""
        shown = text
        if len(text) > LONGEST:
            half = LONGEST // 2
            shown = f"{text[:half]}…{text[-half:]}"
        parts = {"{classes}": self.classes, "{task}": shown}
        return re.sub(r"\{classes\}|\{task\}", lambda match: parts[match[0]], self.asked)

    def _likelihoods(self, texts: Sequence[str]) -> Matrix:
        """log P(name | question), (texts, classes)."""
        pairs = []
        for text in texts:
            prompt = self.render(self.question(text))
            pairs += [(prompt, name) for name in self.names]
        found = np.array(self.loglikelihood(pairs), float)
        if not np.isfinite(found).all():
            raise ModelError(
                "gives class names likelihoods that are not numbers",
                where="--classify",
                remedy="Use --classify neighbours.",
            )
        return found.reshape(len(texts), len(self.names))


def both(votes: Matrix, shares: Matrix) -> Matrix:
    """The product of the neighbours' and the model's shares, normalised; (texts, classes)."""
    product: Matrix = np.maximum(votes, LEAST) * shares
    total: Matrix = product / product.sum(1, keepdims=True)
    return total


def softmax(scores: Matrix) -> Matrix:
    """The softmax of each row."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    # above 0, so that its logarithm is a number
    shares: Matrix = np.maximum(powers / powers.sum(1, keepdims=True), np.finfo(float).tiny)
    return shares
