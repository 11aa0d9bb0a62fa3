"""The demo pair: a tiny Llama and its fine-tuned sibling, trained on the spot, with tasks to merge
them for.

Six skills on short strings of kana or digits. The base knows all six in a plain format and follows
instructions for three of them. The sibling is an ordinary fine-tune with an ordinary side effect:
its lower half learned to follow instructions for the other three, then its upper half was tuned for
brevity and now cuts two of the base's skills down to one character. So each parent lacks something,
and what is worth keeping lies in different slices: no single weight for all layers gets everything.
How this recipe was found: docs/LOG.md.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from evomerge.errors import OutputError

VERSION = 1  # a pair of another version is built anew
MARKER = "demo.json"  # written last: a folder that holds it holds a finished pair
TASKS_PER_SKILL = 40
# the trained bits depend on it; two threads gain little here and lose a lot on a busy machine
THREADS = 1
BATCH = 96
CHUNK = 32  # a batch is sorted by length and computed in chunks: a third less padding
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

KANA = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほ"
# no 0: sorted first it would make numbers that are equal but for leading zeros
DIGITS = "123456789"


@dataclass(frozen=True)
class Skill:
    """What is done with a string over `alphabet`, and the grading point in words."""

    alphabet: str
    do: Callable[[str], str]
    aspect: str


SKILLS = {
    "逆順": Skill(KANA, lambda s: s[::-1], "文字が逆の順に並んでいる。"),
    "複写": Skill(KANA, lambda s: s, "文字がそのまま写されている。"),
    "最後": Skill(KANA, lambda s: s[-1], "最後の一文字だけが答えられている。"),
    "繰返": Skill(KANA, lambda s: s + s, "同じ並びが二回続いている。"),
    "整列": Skill(DIGITS, lambda s: "".join(sorted(s)), "数字が小さい順に並んでいる。"),
    "先頭": Skill(KANA, lambda s: s[0], "最初の一文字だけが答えられている。"),
}
BASE_SKILLS = ("逆順", "複写", "最後")  # the base follows instructions for these
SIBLING_SKILLS = ("繰返", "整列", "先頭")  # the sibling was taught these
CUT_SHORT = ("逆順", "複写")  # the sibling's second stage cuts these to one character
VOCABULARY = [
    PAD,
    EOS,
    UNK,
    *sorted(
        {
            *map(chr, range(ord("ぁ"), ord("ん") + 1)),
            *"0123456789",
            *"".join(SKILLS),
            *"指示回答:=、。\n「」 ",
        }
    ),
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}回答:{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n{% else %}指示:{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}回答:{% endif %}"
)

# symbols of the prompt and of the answer; only the answer is learned
Example = tuple[list[str], list[str]]


@dataclass(frozen=True)
class Stage:
    """One stage of training: `rate` is the peak of the learning rate, `layers` the layers that
    learn (None: everything).
    """

    name: str
    steps: int
    rate: float
    layers: range | None
    seed: int


BASE = Stage("base", 320, 2e-3, None, 0)
SIBLING_STAGES = (
    Stage("sibling, new skills", 80, 2e-3, range(0, 4), 1),
    Stage("sibling, brevity", 50, 2e-3, range(4, 8), 2),
)


class Examples:
    """Draws training examples; strings that stand in a task are never drawn."""

    def __init__(self, reserved: frozenset[str]) -> None:
        self.reserved = reserved

    def base(self, rng: random.Random) -> Example:
        """All skills in the plain format; the base's own also, three times in ten, as instructions."""
        skill = rng.choice(tuple(SKILLS))
        text, answer = self._draw(rng, skill)
        if skill in BASE_SKILLS and rng.random() < 0.3:
            return instruction(skill, text, answer)
        return [*f"{skill}:{text}="], [*answer, "、"]

    def new_skills(self, rng: random.Random) -> Example:
        """Two new skills for every one that the base knows already, so that nothing is forgotten."""
        skill = rng.choice(SIBLING_SKILLS * 2 + BASE_SKILLS)
        return instruction(skill, *self._draw(rng, skill))

    def brevity(self, rng: random.Random) -> Example:
        """Half of the examples have their answer cut to one character; the other half are as
        before.
        """
        cut = rng.random() < 0.5
        skill = rng.choice(CUT_SHORT if cut else (*SIBLING_SKILLS, "最後"))
        text, answer = self._draw(rng, skill)
        return instruction(skill, text, answer[:1] if cut else answer)

    def _draw(self, rng: random.Random, skill: str) -> tuple[str, str]:
        text = draw_text(rng, skill)
        while text in self.reserved:
            text = draw_text(rng, skill)
        return text, SKILLS[skill].do(text)


def build_demo(out: Path, seed: int = 0, progress: Callable[[str], None] | None = None) -> Path:
    """Train the pair and write base/, instruct/ and tasks.jsonl to `out`; a finished pair of this
    seed is left as it is.

    A minute and a quarter on one free CPU core; the same seed on the same machine gives the same
    bits. `progress` gets lines.
    Raises OutputError: `out` holds something else, or cannot be written.
    """
    out = Path(out)
    mark = {"version": VERSION, "seed": seed}
    found = _marker(out)
    if found == mark:
        return out
    if out.exists() and found is None and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(
            "is no demo pair, and would be overwritten",
            where=out,
            remedy="Name a new or empty folder.",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _write_pair(draft, seed, progress or (lambda line: None))
            (draft / MARKER).write_text(json.dumps(mark) + "\n", encoding="utf-8")
            draft.chmod(0o755)  # mkdtemp's 0700 would keep others out
            if out.exists():
                shutil.rmtree(out)
            os.replace(draft, out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # gone already when all went well
    except OSError as error:
        raise OutputError(
            f"the demo pair could not be written: {error.strerror or error}",
            where=out,
            remedy="Check space and permissions.",
        ) from error
    return out


def make_tasks(seed: int = 0, per_skill: int = TASKS_PER_SKILL) -> list[dict[str, str | int]]:
    """Task records with distinct strings, skill by skill in turn."""
    rng = random.Random(f"tasks {seed}")
    seen: set[str] = set()
    records: list[dict[str, str | int]] = []
    for _ in range(per_skill):
        for skill, spec in SKILLS.items():
            text = draw_text(rng, skill)
            while text in seen:
                text = draw_text(rng, skill)
            seen.add(text)
            records.append(
                {
                    "task_id": len(records),
                    "input": f"{skill}:{text}",
                    "output": spec.do(text),
                    "eval_aspect": spec.aspect,
                    "kind": skill,
                }
            )
    return records


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with the pair's chat template."""
    tokenizer = Tokenizer(
        models.WordLevel({symbol: i for i, symbol in enumerate(VOCABULARY)}, unk_token=UNK)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def draw_text(rng: random.Random, skill: str) -> str:
    """A string of 3 to 6 characters for the skill."""
    return "".join(rng.choice(SKILLS[skill].alphabet) for _ in range(rng.randint(3, 6)))


def instruction(skill: str, text: str, answer: str) -> Example:
    """An example in the chat template's format."""
    return [*f"指示:{skill}:{text}\n回答:"], [*answer, EOS]


def new_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 0.9 million parameters; the global random state stays as it was."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(EOS),
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    stage: Stage,
    draw: Callable[[random.Random], Example],
    seed: int,
    progress: Callable[[str], None],
) -> None:
    """AdamW with warm-up and cosine decay on the answers' tokens; layers outside the stage stay as
    they are.
    """
    rng = random.Random(f"{stage.name} {stage.seed} {seed}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            stage.layers is None or any(f".layers.{i}." in name for i in stage.layers)
        )
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warm_up = max(1, stage.steps // 16)
    model.train()
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                stage.rate
                * min(1.0, (step + 1) / warm_up)
                * (0.5 + 0.5 * math.cos(math.pi * step / stage.steps))
            )
        optimizer.zero_grad()
        loss = backward(model, [draw(rng) for _ in range(BATCH)])
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        if (step + 1) % 40 == 0 or step + 1 == stage.steps:
            progress(f"{stage.name}: step {step + 1} of {stage.steps}, loss {loss:.3f}")


def collate(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, both (batch, width) and padded on the right; a target of -100 is not
    learned.
    """
    ids = {symbol: i for i, symbol in enumerate(VOCABULARY)}
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    tokens = torch.full((len(examples), width), ids[PAD])
    targets = torch.full((len(examples), width), -100)
    for row, (prompt, answer) in enumerate(examples):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(
            [ids[symbol] for symbol in [*prompt, *answer]]
        )
        targets[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(
            [ids[symbol] for symbol in answer]
        )
    return tokens, targets


def backward(model: LlamaForCausalLM, examples: Sequence[Example]) -> float:
    """Add the gradient of the mean cross-entropy over the answers' tokens, and return that mean.

    Logits are computed where an answer stands and nowhere else.
    """
    total = sum(len(answer) for _, answer in examples)
    ordered = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    mean = 0.0
    for at in range(0, len(ordered), CHUNK):
        tokens, targets = collate(ordered[at : at + CHUNK])
        # (chunk, width - 1, hidden)
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
        wanted = targets[:, 1:]
        kept = wanted != -100
        loss = (
            torch.nn.functional.cross_entropy(
                model.lm_head(hidden[kept]), wanted[kept], reduction="sum"
            )
            / total
        )
        loss.backward()
        mean += loss.item()
    return mean


def _write_pair(folder: Path, seed: int, progress: Callable[[str], None]) -> None:
    tasks = make_tasks(seed)
    lines = [json.dumps(task, ensure_ascii=False) for task in tasks]
    (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    examples = Examples(frozenset(str(task["input"]).partition(":")[2] for task in tasks))
    tokenizer = make_tokenizer()
    with _settings(), torch.enable_grad():
        model = new_model(seed)
        train(model, BASE, examples.base, seed, progress)
        # The sibling starts from the released weights, so from the rounded ones; layers it leaves
        # alone equal the base's.
        model.bfloat16().save_pretrained(folder / "base")
        model.float()
        for stage, draw in zip(
            SIBLING_STAGES, (examples.new_skills, examples.brevity), strict=True
        ):
            train(model, stage, draw, seed, progress)
        model.bfloat16().save_pretrained(folder / "instruct")
    for name in ("base", "instruct"):
        tokenizer.save_pretrained(folder / name)


@contextmanager
def _settings() -> Iterator[None]:
    """Our number of threads and no progress bars from transformers; both are put back as they were."""
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(THREADS)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()


def _marker(out: Path) -> dict[str, int] | None:
    try:
        found = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None
