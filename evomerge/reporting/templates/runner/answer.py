"""Answers tasks with the merged model of recipe.yaml: see README.md."""

import json
import re
import sys
import time
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import answer_tools as tools

with tools.one_line_errors():  # these take some seconds
    import numpy as np
    import torch
    import yaml
    from safetensors import safe_open
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_union
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

NEVER = "(?!)"  # a pattern that matches nothing
NO_MEMORY = "(?i)can't allocate memory|out of memory|_STATUS_ALLOC_FAILED"


def read_yaml(name: str):
    """The file next to this one, or None."""
    path = Path(__file__).resolve().with_name(name)
    return yaml.safe_load(path.read_text("utf-8")) if path.exists() else None


RECIPE, SETTINGS, BASE = map(read_yaml, ("recipe.yaml", "settings.yaml", "knowledge.yaml"))


def merge(model, donor: str, folders: dict[str, str]) -> None:
    """Replace the donor's (the base's) weights by the merged ones, rounded as mergekit does."""
    linear = RECIPE["merge_method"] == "linear"
    of_layer = []  # the sources of each layer
    for piece in RECIPE["slices"]:
        of_layer += [piece["sources"] for _ in range(*piece["sources"][0]["layer_range"])]
    stored = {}
    for sibling, folder in folders.items():
        for path in Path(folder).glob("model*.safetensors"):
            file = safe_open(path, "pt")  # nothing is read yet
            stored.update({(sibling, name): file for name in file.keys()})  # noqa: SIM118
    for name, live in model.named_parameters():
        sources = of_layer[layer_of(name, model.config.architectures[0])]
        if not linear:
            sources = [source for source in sources if source["model"] != donor]
        refs = [source["model"] for source in sources]
        inputs = [live if ref == donor else stored[ref, name].get_tensor(name) for ref in refs]
        if any(tensor.element_size() < 2 for tensor in (live, *inputs)):  # fp8 and its like
            tools.fail(f"{name} is quantised: evomerge export STUDY --model DIR, --model DIR")
        inputs = [tensor.to(live) for tensor in inputs]
        live.copy_(merged(live, inputs, sources, linear))


def layer_of(name: str, architecture: str) -> int:
    """The layer whose weights a tensor is merged with: embeddings follow the first layer."""
    if found := re.search(r"\blayers\.(\d+)\.", name):
        return int(found[1])
    last = name.startswith(("model.norm.", "lm_head."))
    if not last and not name.startswith("model.embed_tokens."):
        tools.fail(f"only `evomerge merge` can merge {architecture}: name the merged folder", 1)
    return -1 if last and architecture in SETTINGS["norm_and_head_last"] else 0


def merged(live, inputs: list, sources: list[dict], linear: bool):
    """One tensor: linear in fp32, rounded once; task arithmetic in the tensor's own dtype."""
    dtype = torch.float32 if linear else live.dtype
    weights = [source["parameters"]["weight"] for source in sources]
    weights = torch.tensor(weights, dtype=dtype).to(live.device)
    start = torch.zeros_like(live, dtype=dtype) if linear else live
    norm = 1
    if RECIPE["parameters"]["normalize"] and weights.sum().float().abs() >= 1e-8:
        norm = weights.sum()
    parts = [(t - start) * w for t, w in zip(inputs, weights, strict=True)]
    return start + torch.stack(parts).sum(dim=0) / norm


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def request(text: str) -> str:
    """The request in a task: its first and its last paragraph, without long quotations."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(SETTINGS["voting"]["quoted"], lambda match: match[0][0] + match[0][-1], text)
    lines = [line for line in text.split("\n") if line.strip()]
    return plain("\n".join(dict.fromkeys([*lines[:1], *lines[-1:]])))


def vectors(known: list[str], texts: list[str], longest: int, *views) -> tuple:
    """TF-IDF vectors of both, over n-grams of 1 to `longest` characters of each view of a text."""
    options = {"analyzer": "char", "ngram_range": (1, longest), "sublinear_tf": True}
    both = make_union(*(TfidfVectorizer(preprocessor=view, **options) for view in views))
    return both.fit_transform(known), both.transform(texts)


def similarities(known: list[str], tasks: list[str], longest: int):
    """Cosine similarity of each task (row) to each known text (column)."""
    old, new = vectors(known, tasks, longest, plain)
    return (new @ old.T).toarray().clip(0, 1).round(9)


def learned_shares(tasks: list[str], owners, weights, count: int):
    """Each class's factor by a ridge regression on all examples, (tasks, classes)."""
    rules = SETTINGS["voting"]
    inputs = [example["input"] for example in BASE["examples"]]
    known, new = vectors(inputs, tasks, rules["ridge_ngrams"], plain, request)
    targets = 2.0 * np.eye(count)[owners] - 1  # (examples, classes)
    ridge = Ridge(alpha=rules["alpha"], solver="sparse_cg")
    ridge.fit(known, targets, sample_weight=weights)
    return np.exp(rules["sharp"] * ridge.predict(new).reshape(len(tasks), -1))


def choose(tasks: list[str]):
    """Each task with its class, that class's nearest examples (nearest last), and documents.

    The class is found by the nearest examples and by a ridge regression on all of them.
    """
    rules, examples, documents = SETTINGS["voting"], BASE["examples"], BASE.get("documents", [])
    classes = {c["class"]: c | SETTINGS["classes"][c["class"]] for c in BASE["classes"]}
    names = list(classes)
    owners = np.array([names.index(example["class"]) for example in examples])
    weights = np.array([example.get("weight", 1.0) for example in examples])
    inputs = [plain(example["input"]) for example in examples]
    titled = [f"{d['title']}\n{d['text']}" for d in documents] or ["-"]
    near_examples = similarities(inputs, tasks, rules["ngrams"])
    near_documents = similarities(titled, tasks, rules["ngrams"])
    learned = learned_shares(tasks, owners, weights, len(names))
    for at, text in enumerate(tasks):
        row = near_examples[at]
        # an example that equals the task would give the answer away
        bare = plain(text).replace(" ", "")
        near = np.argsort(-row, kind="stable")
        near = [i for i in near if inputs[i].replace(" ", "") != bare]
        voters = near[: rules["voters"]]
        strengths = weights[voters] * row[voters] ** rules["power"]
        votes = np.bincount(owners[voters], strengths, len(names)).round(12)
        shares = votes / (votes.sum() or 1)
        if len(near) == len(examples):  # where one equals the task, the votes decide alone
            shares = np.maximum(shares, rules["least"]) ** rules["root"] * learned[at]
        name = rules["default"]
        if votes.any():
            sure = shares.max() / shares.sum() * min(1.0, row[near[0]] / rules["clear"])
            if sure and sure >= rules["threshold"]:
                name = names[shares.argmax()]
        kind = classes[name]
        shown = [examples[i] for i in near if examples[i]["class"] == name][: kind["examples"]]
        order = np.argsort(-near_documents[at], kind="stable")
        quoted = [documents[i] for i in order if documents][: kind["documents"]]
        yield text, kind, shown[::-1], quoted


def turns(kind: dict, text: str, examples: list, documents: list) -> list[tuple[str, str]]:
    """The conversation: the system text, the examples as turns or in the template, the task."""
    values = {
        "input": text,
        "examples": "\n\n".join(map("指示: {input}\n回答: {output}".format_map, examples)),
        "documents": "\n\n".join(map("{title}\n{text}".format_map, documents)),
    }
    said = [("system", kind["system"])]
    shots = [] if "{examples}" in kind["template"] else examples
    for given in [*shots, values]:
        fill = lambda match, given=given: given.get(match[1], "")  # noqa: E731
        asked = re.sub(SETTINGS["placeholder"], fill, kind["template"])
        said += [("user", asked), ("assistant", given.get("output", ""))]
    return [(role, content) for role, content in said if content]


def prompt(
    tokenizer, room: int, text: str, kind: dict, examples: list, documents: list
) -> tuple[str, list[int]]:
    """The whole text that the model sees, and its tokens, at most `room` of them."""
    tokens = tokenizer.added_tokens_decoder.values()
    marks = [t.content for t in tokens if t.special or re.fullmatch(r"[<\[].+[>\]]", t.content)]
    # a space inside turns a control token into plain text
    control = "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or NEVER
    chat = []
    for role, content in turns(kind, text, examples, documents):
        content = re.sub(control, lambda match: f"{match[0][0]} {match[0][1:]}", content)
        chat.append({"role": role, "content": content})
    variables = SETTINGS["chat_template_kwargs"]
    whole = tools.filled(tokenizer, SETTINGS["chat_template"], variables, chat)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if len(ids) > room and examples:  # the least similar one is dropped
        return prompt(tokenizer, room, text, kind, examples[1:], documents)
    if len(ids) > room and documents:
        return prompt(tokenizer, room, text, kind, examples, documents[:-1])
    if len(ids) > room and (room < 1 or SETTINGS["too_long"] == "refuse"):
        tools.fail(f"a task of {len(ids)} tokens is too long for {room}: {text[:60]}", 1)
    return whole, ids[-room:]


def load(model_folder: str | None, donor: str, folders: dict[str, str]):
    """The merged model, on the GPU where there is one."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of the keys
    model = tools.load(folders[donor], dtype=RECIPE["dtype"], use_safetensors=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    if not model_folder:
        merge(model, donor, folders)
    return model


def answer(model, tokenizer, waiting: list[int], asked: list, own: list[dict]) -> dict[int, dict]:
    """Answers to the first batch of the waiting tasks; a batch shares its generation settings."""
    batch = [i for i in waiting if own[i] == own[waiting[0]]][: SETTINGS["batch_size"]]
    width = len(asked[batch[-1]])  # the longest is the last
    padded = [[-1] * (width - len(asked[i])) + asked[i] for i in batch]
    ids = torch.tensor(padded).to(model.device)
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        **own[batch[0]], eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(SETTINGS["seed"] + batch[0])
    try:
        new = model.generate(ids.where(ids >= 0, ids[:, -1:]), attention_mask=(ids >= 0).long())
    except (RuntimeError, MemoryError) as error:  # CUDA's libraries have only words for it
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        if len(batch) == 1:
            tools.fail("the GPU has no memory for a single answer", 1)
        SETTINGS["batch_size"] = len(batch) // 2
        torch.cuda.empty_cache()
        return {}
    stop = "|".join(map(re.escape, SETTINGS["stop"])) or NEVER
    answers, marks = {}, tools.find_marks(tokenizer, **SETTINGS["reasoning"])
    for i, tokens in zip(batch, new[:, width:].tolist(), strict=True):
        text = tools.replied(tokenizer, tokens, marks)
        kept = re.split(stop, text)[0]
        ended = set(tokens) & set(ends if isinstance(ends, list) else [ends])
        thoughts, output = tools.split(kept, marks, tokenizer.decode(asked[i][-50:]))
        whole = ended or (kept != text and (output or not thoughts))
        found = {"output": output, "thoughts": thoughts, "truncated": not whole}
        answers[i] = {name: value for name, value in found.items() if value or name == "output"}
    return answers


def prompts(tokenizer, context: int, inputs: list[str]) -> tuple[list[list[int]], list[dict]]:
    """The tokens of each task's prompt, and its generation settings."""
    choices = choose(inputs) if BASE else [(text, SETTINGS["plain"], [], []) for text in inputs]
    asked, own = [], []
    for choice in choices:
        settings = dict(choice[1]["generation"])
        if choice[1]["own_length"]:  # half of a small context is for the prompt
            settings["max_new_tokens"] = min(settings["max_new_tokens"], max(1, context // 2))
        own.append(settings)
        asked.append(prompt(tokenizer, context - settings["max_new_tokens"], *choice)[1])
    return asked, own


def main() -> None:
    """Answer the tasks that have no answer yet, and write the answers."""
    start = time.monotonic()
    args = tools.read_options(__doc__)
    tasks = tools.read_tasks(args.tasks)
    donor = args.model or SETTINGS["donor"]
    if not donor:
        tools.fail("only evomerge can merge this: evomerge export STUDY --model DIR, --model DIR")
    names = [args.model] if args.model else SETTINGS["models"]
    folders = tools.find_models(names, args.path, SETTINGS["files"])
    tokenizer = AutoTokenizer.from_pretrained(folders[donor])
    config = AutoConfig.from_pretrained(folders[donor]).get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or 10**9
    asked, own = prompts(tokenizer, context, [task["input"] for task in tasks.values()])
    each = zip(tasks, own, asked, strict=True)
    marks = tools.find_marks(tokenizer, **SETTINGS["reasoning"]) or ()
    keys = [tools.hash_of((args.model, RECIPE, *made_from, *marks)) for made_from in each]
    facts = {"model": (args.model, RECIPE), "tasks": list(tasks.values()), "prompts": keys}
    facts = {name: tools.hash_of(value) for name, value in facts.items()}
    part = args.out.with_name(args.out.name + ".part")
    if not args.overwrite and tools.is_finished(args.out, facts, part.exists()):
        return print(f"{args.out} holds these answers already: nothing to do")
    done = tools.read_part(part)
    waiting = [i for i, key in enumerate(keys) if key not in done]
    waiting.sort(key=lambda i: len(asked[i]) + own[i]["max_new_tokens"])  # the cheapest first
    model = load(args.model, donor, folders) if waiting else None
    while waiting and time.monotonic() - start < args.time_limit:
        then = time.monotonic()
        answers = answer(model, tokenizer, waiting, asked, own)
        waiting = [i for i in waiting if i not in answers]
        done |= {keys[i]: found for i, found in answers.items()}
        tools.write(part, json.dumps(done, ensure_ascii=False))
        left = (time.monotonic() - then) * len(waiting) / max(1, len(answers))
        print(f"{len(done)} of {len(keys)} tasks, about {left:.0f} s to go", flush=True)
    missing = {"output": "", "unfinished": "time limit"}
    rows = [task | done.get(key, missing) for task, key in zip(tasks.values(), keys, strict=True)]
    tools.finish(args.out, rows, facts, not waiting)
    if not waiting:
        part.unlink(missing_ok=True)
    elif len(waiting) == len(keys):
        tools.fail("no task was answered within the time limit; they are marked in the file", 1)


if __name__ == "__main__":
    with tools.one_line_errors():
        main()
