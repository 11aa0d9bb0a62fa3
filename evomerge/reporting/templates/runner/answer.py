"""Answers tasks with the merged model of recipe.yaml, as settings.yaml and knowledge.yaml say: see
README.md.
"""

import argparse
import hashlib
import json
import re
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import safe_open
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_union
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FILES = [
    Path(__file__).resolve().with_name(f"{name}.yaml")
    for name in ("recipe", "settings", "knowledge")
]
RECIPE, SETTINGS, BASE = (
    yaml.safe_load(file.read_text("utf-8")) if file.exists() else None for file in FILES
)


def merge(model, donor: str, folders: dict[str, str]) -> None:
    """Put the recipe's weights in the place of the donor's (the base's), tensor by tensor, with
    mergekit's roundings.
    """
    linear, slices = (
        RECIPE["merge_method"] == "linear",
        [piece["sources"] for piece in RECIPE["slices"]],
    )
    of_layer = [sources for sources in slices for _ in range(*sources[0]["layer_range"])]
    files = [
        (sibling, safe_open(path, "pt"))
        for sibling, folder in folders.items()
        for path in Path(folder).glob("model*.safetensors")
    ]
    stored = {(sibling, name): file for sibling, file in files for name in file.keys()}  # noqa: SIM118  # nothing is read yet
    for name, live in model.named_parameters():
        layer, end = (
            re.search(r"\blayers\.(\d+)\.", name),
            name.startswith(("model.norm.", "lm_head.")),
        )
        place = (
            int(layer[1])
            if layer
            else -1
            if end and model.config.architectures[0] in SETTINGS["norm_and_head_last"]
            else 0
        )
        sources = [s for s in of_layer[place] if linear or s["model"] != donor]
        weights = torch.tensor(
            [s["parameters"]["weight"] for s in sources],
            dtype=torch.float32 if linear else live.dtype,
        ).to(live.device)
        inputs = [
            live if s["model"] == donor else stored[s["model"], name].get_tensor(name).to(live)
            for s in sources
        ]
        # linear: all in fp32, rounded once
        start = torch.zeros_like(live, dtype=weights.dtype) if linear else live
        norm = (
            weights.sum()
            if RECIPE["parameters"]["normalize"] and weights.sum().float().abs() >= 1e-8
            else 1
        )
        live.copy_(
            start
            + torch.stack([(t - start) * w for t, w in zip(inputs, weights, strict=True)]).sum(
                dim=0
            )
            / norm
        )


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def request(text: str) -> str:
    """What a task asks for: its first and its last paragraph, with long quotations emptied."""
    text = re.sub(
        SETTINGS["voting"]["quoted"],
        lambda match: match[0][0] + match[0][-1],
        unicodedata.normalize("NFKC", text),
    )
    lines = [line for line in text.split("\n") if line.strip()]
    return plain("\n".join(dict.fromkeys([*lines[:1], *lines[-1:]])))


def vectors(known: list[str], texts: list[str], longest: int, *views) -> tuple:
    """TF-IDF vectors of both, over n-grams of 1 to `longest` characters of each view of a text."""
    both = make_union(
        *(
            TfidfVectorizer(
                analyzer="char", ngram_range=(1, longest), preprocessor=v, sublinear_tf=True
            )
            for v in views
        )
    )
    return both.fit_transform(known), both.transform(texts)


def choose(tasks: list[str]):
    """Each task's class, by its nearest examples and by a ridge regression on all, with examples
    (nearest last) and documents.
    """
    rules, classes = (
        SETTINGS["voting"],
        {c["class"]: c | SETTINGS["classes"][c["class"]] for c in BASE["classes"]},
    )
    names, examples, documents = list(classes), BASE["examples"], BASE.get("documents", [])
    owners, weights = (
        np.array([names.index(e["class"]) for e in examples]),
        np.array([e.get("weight", 1.0) for e in examples]),
    )
    groups = (
        [plain(e["input"]) for e in examples],
        [f"{d['title']}\n{d['text']}" for d in documents] or ["-"],
    )
    similar = [
        (new @ known.T).toarray().clip(0, 1).round(9)
        for known, new in (vectors(g, tasks, rules["ngrams"], plain) for g in groups)
    ]
    known, new = vectors(
        [e["input"] for e in examples], tasks, rules["ridge_ngrams"], plain, request
    )
    ridge = Ridge(alpha=rules["alpha"], solver="sparse_cg").fit(
        known, 2.0 * np.eye(len(names))[owners] - 1, sample_weight=weights
    )
    learned = np.exp(rules["sharp"] * ridge.predict(new).reshape(len(tasks), -1))
    for text, bare, likely, row, quoted in zip(
        tasks, [plain(t).replace(" ", "") for t in tasks], learned, *similar, strict=True
    ):
        # it would be the answer
        near = [i for i in np.argsort(-row, kind="stable") if groups[0][i].replace(" ", "") != bare]
        voters = near[: rules["voters"]]
        votes = np.bincount(
            owners[voters], weights[voters] * row[voters] ** rules["power"], len(names)
        ).round(12)
        shares = votes / (votes.sum() or 1)
        if len(near) == len(examples):  # where one equals the task, the votes decide alone
            shares = np.maximum(shares, rules["least"]) ** rules["root"] * likely
        sure = votes.any() and shares.max() / shares.sum() * min(1.0, row[near[0]] / rules["clear"])
        kind = classes[
            names[shares.argmax()] if sure and sure >= rules["threshold"] else rules["default"]
        ]
        shown = [examples[i] for i in near if examples[i]["class"] == kind["class"]][
            : kind["examples"]
        ]
        yield (
            text,
            kind,
            shown[::-1],
            [documents[i] for i in np.argsort(-quoted, kind="stable") if documents][
                : kind["documents"]
            ],
        )


def prompt(
    tokenizer, room: int, text: str, kind: dict, examples: list, documents: list
) -> tuple[str, list[int]]:
    """The whole text that the model sees, and its tokens, at most `room` of them."""
    shots = [] if "{examples}" in kind["template"] else examples
    shown, quoted = (
        map("指示: {input}\n回答: {output}".format_map, examples),
        map("{title}\n{text}".format_map, documents),
    )
    given = [
        *shots,
        {
            "input": text,
            "output": "",
            "examples": "\n\n".join(shown),
            "documents": "\n\n".join(quoted),
        },
    ]
    asked = [
        re.sub(
            SETTINGS["placeholder"], lambda match, v=values: v.get(match[1], ""), kind["template"]
        )
        for values in given
    ]
    said = [
        ("system", kind["system"]),
        *(
            t
            for q, v in zip(asked, given, strict=True)
            for t in (("user", q), ("assistant", v["output"]))
        ),
    ]
    added = [
        t.content
        for t in tokenizer.added_tokens_decoder.values()
        if t.special or re.fullmatch(r"[<\[].+[>\]]", t.content)
    ]
    # a space breaks these
    control = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")
    chat = [
        {"role": role, "content": control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)}
        for role, text in said
        if text
    ]
    whole = tokenizer.apply_chat_template(
        chat, chat_template=SETTINGS["chat_template"], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if len(ids) > room and (examples or documents):  # the least similar one goes
        return prompt(
            tokenizer, room, text, kind, examples[1:], documents if examples else documents[:-1]
        )
    if len(ids) > room and (room < 1 or SETTINGS["too_long"] == "refuse"):
        raise SystemExit(
            f"a task of {len(ids)} tokens is too long, there is room for {room}: {text[:60]}"
        )
    return whole, ids[-room:]


if __name__ == "__main__":
    parser, start = argparse.ArgumentParser(description=__doc__), time.monotonic()
    parser.add_argument(
        "--path",
        nargs="*",
        default=[],
        metavar="NAME=FOLDER",
        help="where a model of recipe.yaml lies here",
    )
    for flag in ("--tasks", "--out", "--model", "--time-limit"):
        parser.add_argument(
            flag,
            required=flag in ("--tasks", "--out"),
            type=float if flag == "--time-limit" else str,
        )
    args = parser.parse_args()
    at, tasks, text = 0, {}, Path(args.tasks).read_text("utf-8-sig")
    # JSON lines; a record may spread over several
    while blank := re.compile(r"\s*(?=\S)").match(text, at):
        record, at = json.JSONDecoder().raw_decode(text, blank.end())
        number = record.get("task_id") if record.get("task_id") not in (None, "") else len(tasks)
        # half of a surrogate pair ends here
        task = {"task_id": number, "input": record.get("input", "").encode().decode()}
        if not task["input"].strip() or tasks.setdefault(str(number), task) is not task:
            parser.error(
                f"record {len(tasks) + 1} of the tasks has no text under `input`, or an earlier one's task_id: {record}"
            )
    donor = (
        args.model
        or SETTINGS["donor"]
        or parser.error(
            "evomerge alone merges this: evomerge export STUDY --model DIR, --model DIR"
        )
    )
    places = {name: name for name in ([args.model] if args.model else SETTINGS["models"])} | dict(
        p.rsplit("=", 1) for p in args.path
    )
    for name in (
        name
        for name, at in places.items()
        if not (Path(at).is_dir() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", at))
    ):
        parser.error(
            f"there is no folder {places[name]}: say where that model lies, with --path {name}=FOLDER"
        )
    folders = {
        name: at if Path(at).is_dir() else snapshot_download(at, allow_patterns=SETTINGS["files"])
        for name, at in places.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(folders[donor])
    model = AutoModelForCausalLM.from_pretrained(
        folders[donor], dtype=RECIPE["dtype"], use_safetensors=True
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    if not args.model:
        merge(model, donor, folders)
    inputs = [task["input"] for task in tasks.values()]
    choices = (
        list(choose(inputs)) if BASE else [(text, SETTINGS["plain"], [], []) for text in inputs]
    )
    context, own = (
        getattr(model.config, "max_position_embeddings", 10**9),
        [choice[1]["generation"] for choice in choices],
    )
    asked = [
        prompt(tokenizer, context - choice[1]["generation"]["max_new_tokens"], *choice)[1]
        for choice in choices
    ]
    keys = [
        hashlib.sha256(repr((args.model, RECIPE, *x)).encode()).hexdigest()
        for x in zip(tasks, own, asked, strict=True)
    ]
    ends, stop = (
        model.generation_config.eos_token_id or tokenizer.eos_token_id,
        "|".join(map(re.escape, SETTINGS["stop"])) or "(?!)",
    )
    part, spare = Path(f"{args.out}.part"), Path(f"{args.out}.tmp")
    # what an earlier run has answered
    done = json.loads(part.read_text("utf-8")) if part.exists() else {}
    waiting = sorted(
        (i for i, key in enumerate(keys) if key not in done),
        key=lambda i: len(asked[i]) + own[i]["max_new_tokens"],
    )
    while waiting and (then := time.monotonic()) - start < 60 * (
        float("inf") if args.time_limit is None else args.time_limit
    ):
        # the cheapest first; settings are a batch's
        batch = [i for i in waiting if own[i] == own[waiting[0]]][: SETTINGS["batch_size"]]
        waiting = [i for i in waiting if i not in batch]
        # -1: padding
        ids = torch.tensor(
            [[-1] * (len(asked[batch[-1]]) - len(asked[i])) + asked[i] for i in batch]
        ).to(model.device)
        model.generation_config = GenerationConfig(
            **own[batch[0]], eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        torch.manual_seed(SETTINGS["seed"] + batch[0])
        new = model.generate(ids.where(ids >= 0, ids[:, -1:]), attention_mask=(ids >= 0).long())[
            :, ids.shape[1] :
        ]
        outputs = [
            re.split(stop, text)[0]
            for text in tokenizer.batch_decode(new, skip_special_tokens=True)
        ]
        done |= {keys[i]: {"output": output} for i, output in zip(batch, outputs, strict=True)}
        spare.write_text(json.dumps(done, ensure_ascii=False), "utf-8")
        spare.replace(part)  # whole or not at all
        print(
            f"{len(done)} of {len(keys)} tasks, about {(time.monotonic() - then) * len(waiting) / len(batch):.0f} s to go",
            flush=True,
        )
    rows = [
        task | done.get(key, {"output": "", "unfinished": "time limit"})
        for task, key in zip(tasks.values(), keys, strict=True)
    ]
    spare.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="\n"
    )
    spare.replace(args.out)
    if done.keys() >= set(keys):
        part.unlink(missing_ok=True)
