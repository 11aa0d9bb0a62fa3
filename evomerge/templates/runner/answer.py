"""Answers tasks with the merged model of recipe.yaml, as settings.yaml and knowledge.yaml say: see README.md."""

import argparse
import hashlib
import json
import os
import re
import time
import unicodedata
from pathlib import Path

import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors import safe_open
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

FILES = [Path(__file__).resolve().with_name(f"{name}.yaml") for name in ("recipe", "settings", "knowledge")]
RECIPE, SETTINGS, BASE = (yaml.safe_load(file.read_text("utf-8")) if file.exists() else None for file in FILES)


@torch.no_grad()
def merge(model, donor: str, folders: dict[str, str]) -> None:
    """Put the recipe's weights in the place of the donor's (the base's), tensor by tensor, with mergekit's roundings."""
    slices, linear = [piece["sources"] for piece in RECIPE["slices"]], RECIPE["merge_method"] == "linear"
    files = [(sibling, safe_open(path, "pt")) for sibling, folder in folders.items() for path in Path(folder).glob("model*.safetensors")]
    stored = {(sibling, name): file for sibling, file in files for name in file.keys()}  # noqa: SIM118  # nothing is read yet
    for name, live in model.named_parameters():
        layer, end = re.search(r"\blayers\.(\d+)\.", name), name.startswith(("model.norm.", "lm_head."))
        outside = slices[-1 if end and model.config.architectures[0] in SETTINGS["norm_and_head_last"] else 0]  # as in mergekit
        inside = (sources for sources in slices if layer and int(layer[1]) in range(*sources[0]["layer_range"]))
        sources = [s for s in next(inside, outside) if linear or s["model"] != donor]
        weights = torch.tensor([s["parameters"]["weight"] for s in sources], dtype=torch.float32 if linear else live.dtype).to(live.device)
        inputs = [live if s["model"] == donor else stored[s["model"], name].get_tensor(name).to(live) for s in sources]
        start = torch.zeros_like(live, dtype=weights.dtype) if linear else live  # linear: all in fp32, rounded once
        total = torch.stack([(tensor - start) * weight for tensor, weight in zip(inputs, weights, strict=True)]).sum(dim=0)
        norm = weights.sum() if RECIPE["parameters"]["normalize"] and weights.sum().float().abs() >= 1e-8 else 1
        live.copy_(start + total / norm)


def rank(known: list[str], texts: list[str], itself: bool) -> list[list[tuple[int, float]]]:
    """For each text the places of the known ones, the most similar first, with the cosines of TF-IDF vectors of n-grams."""
    known, texts = ([" ".join(unicodedata.normalize("NFKC", text).split()) for text in group] for group in (known, texts))
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True)
    matrix = vectors.fit_transform(known).T.tocsr()
    rows = zip(texts, (vectors.transform(texts) @ matrix).toarray().clip(0, 1).round(9), strict=True)
    return [sorted(((i, s) for i, s in enumerate(row) if itself or known[i] != text), key=lambda pair: -pair[1]) for text, row in rows]


def choose(tasks: list[str]) -> list[tuple[dict, list, list]]:
    """Each task's class, by the votes of similar examples, with its nearest examples (the nearest last) and documents."""
    classes, examples, documents = {c["class"]: c for c in BASE["classes"]}, BASE["examples"], BASE.get("documents", [])
    rules, chosen, quotable = SETTINGS["voting"], [], [f"{d['title']}\n{d['text']}" for d in documents]
    ranked = rank([e["input"] for e in examples], tasks, False), rank(quotable, tasks, True) if quotable else [[]] * len(tasks)
    for near, quoted in zip(*ranked, strict=True):
        voters = [(examples[i]["class"], examples[i].get("weight", 1.0) * s ** rules["power"]) for i, s in near[: rules["voters"]]]
        votes = {name: sum(vote for of, vote in voters if of == name) for name in classes}
        name = max(votes, key=lambda name: round(votes[name], 12))
        sure = votes[name] / (sum(votes.values()) or 1) * min(1.0, max([s for _, s in near[:1]] or [0]) / rules["clear"])
        name = name if sure > 0 and sure >= rules["threshold"] else rules["default"]
        own = [examples[i] for i, _ in near if examples[i]["class"] == name][: SETTINGS["classes"][name]["examples"]]
        chosen.append((classes[name], own[::-1], [documents[i] for i, _ in quoted[: SETTINGS["classes"][name]["documents"]]]))
    return chosen


def prompt(tokenizer, room: int, text: str, kind: dict, examples: list, documents: list) -> tuple[str, list[int]]:
    """The whole text that the model sees, and its tokens, at most `room` of them."""
    shots = [] if "{examples}" in kind["template"] else examples
    last = {"input": text, "examples": "\n\n".join(f"指示: {e['input']}\n回答: {e['output']}" for e in examples)}
    last["documents"] = "\n\n".join(f"{d['title']}\n{d['text']}" for d in documents)
    fields = re.compile(r"\{(input|examples|documents)\}")  # filled in one pass: braces in a task stay text
    asked = [fields.sub(lambda match, values=values: values.get(match[1], ""), kind["template"]) for values in (*shots, last)]
    turns = [turn for q, e in zip(asked, shots, strict=False) for turn in (("user", q), ("assistant", e["output"]))]
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special or re.fullmatch(r"[<\[].+[>\]]", t.content)]
    control = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")  # a space breaks these
    turns = [("system", kind["system"]), *turns, ("user", asked[-1])]
    chat = [{"role": role, "content": control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", said)} for role, said in turns if said]
    whole = tokenizer.apply_chat_template(chat, chat_template=SETTINGS["chat_template"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if len(ids) > room and (examples or documents):  # the least similar one goes
        return prompt(tokenizer, room, text, kind, examples[1:], documents if examples else documents[:-1])
    if len(ids) > room and (room < 1 or SETTINGS["too_long"] == "refuse"):
        raise SystemExit(f"a task of {len(ids)} tokens is too long, there is room for {room}: {text[:60]}")
    return whole, ids[-room:]


if __name__ == "__main__":
    parser, start = argparse.ArgumentParser(description=__doc__), time.monotonic()
    parser.add_argument("--path", nargs="*", default=[], metavar="NAME=FOLDER", help="where a model of recipe.yaml lies here")
    for flag in ("--tasks", "--out", "--model", "--time-limit"):
        parser.add_argument(flag, required=flag in ("--tasks", "--out"))
    args = parser.parse_args()
    at, tasks, text = 0, {}, Path(args.tasks).read_text("utf-8-sig")
    while blank := re.compile(r"\s*(?=\S)").match(text, at):  # JSON lines; a record may spread over several
        record, at = json.JSONDecoder().raw_decode(text, blank.end())
        number = record.get("task_id") if record.get("task_id") not in (None, "") else len(tasks)
        task = {"task_id": number, "input": record.get("input", "").encode().decode()}  # half of a surrogate pair ends here
        if not task["input"].strip() or tasks.setdefault(str(number), task) is not task:
            raise SystemExit(f"record {len(tasks) + 1} of the tasks has no text under `input`, or an earlier one's task_id: {record}")
    donor = args.model or SETTINGS["donor"]  # whose configuration and tokenizer the merged model has
    if donor is None:
        raise SystemExit("evomerge alone merges such a recipe: evomerge export STUDY --model DIR, and then python answer.py --model DIR")
    places = dict(pair.rsplit("=", 1) for pair in args.path)
    names = {args.model} if args.model else {source["model"] for piece in RECIPE["slices"] for source in piece["sources"]}
    if missing := [m for m in names if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", places.get(m, m)) and not os.path.isdir(places.get(m, m))]:
        raise SystemExit(f"there is no folder {missing[0]}: say where that model lies, with --path {missing[0]}=FOLDER")
    folders = {m: p if os.path.isdir(p := places.get(m, m)) else snapshot_download(p, allow_patterns=SETTINGS["files"]) for m in names}
    tokenizer = AutoTokenizer.from_pretrained(folders[donor])
    model = AutoModelForCausalLM.from_pretrained(folders[donor], dtype=RECIPE["dtype"], use_safetensors=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if not args.model:
        merge(model, donor, folders)
    choices = choose([t["input"] for t in tasks.values()]) if BASE else [(SETTINGS["plain"], [], [])] * len(tasks)
    own = [SETTINGS["classes"][kind["class"]]["generation"] for kind, _, _ in choices]
    rooms = [getattr(model.config, "max_position_embeddings", 10**9) - settings["max_new_tokens"] for settings in own]
    asked = [prompt(tokenizer, room, t["input"], *choice)[1] for room, t, choice in zip(rooms, tasks.values(), choices, strict=True)]
    keys = [hashlib.sha256(repr((args.model, RECIPE, *x)).encode()).hexdigest() for x in zip(tasks, own, asked, strict=True)]
    ends, stop = model.generation_config.eos_token_id or tokenizer.eos_token_id, "|".join(map(re.escape, SETTINGS["stop"])) or "(?!)"
    with open(f"{args.out}.part", "ab+", buffering=0) as part:  # what is answered, so that the same command goes on after a kill
        part.seek(0)
        lines = [line for line in part.readlines() if line.endswith(b"\n")]  # the last one may be torn
        part.truncate(sum(map(len, lines)))
        done = {key: output for line in lines for key, output in json.loads(line).items()}
        waiting = sorted((i for i, key in enumerate(keys) if key not in done), key=lambda i: len(asked[i]))
        alike = [[i for i in waiting if repr(own[i]) == settings] for settings in dict.fromkeys(map(repr, own))]  # settings are a batch's
        size = SETTINGS["batch_size"]
        batches = [group[first : first + size] for group in alike for first in range(0, len(group), size)]
        for batch in sorted(batches, key=lambda batch: len(asked[batch[-1]]) + own[batch[0]]["max_new_tokens"]):  # the cheapest first
            if time.monotonic() - start > 60 * float(args.time_limit or "inf"):
                break
            padding = [max(len(asked[i]) for i in batch) - len(asked[i]) for i in batch]
            ids = [asked[i][:1] * n + asked[i] for i, n in zip(batch, padding, strict=True)]  # a penalty meets no other token
            mask = [[0] * n + [1] * len(asked[i]) for i, n in zip(batch, padding, strict=True)]
            model.generation_config = GenerationConfig(**own[batch[0]], eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
            torch.manual_seed(SETTINGS["seed"] + batch[0])
            new = model.generate(torch.tensor(ids).to(model.device), attention_mask=torch.tensor(mask).to(model.device))[:, len(ids[0]) :]
            outputs = [re.split(stop, text)[0] for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            part.write(json.dumps(dict(zip([keys[i] for i in batch], outputs, strict=True)), ensure_ascii=False).encode() + b"\n")
            os.fsync(part.fileno())
            done |= zip([keys[i] for i in batch], outputs, strict=True)
            minutes = (time.monotonic() - start) / 60 * (len(keys) - len(done)) / (len(waiting) - len(keys) + len(done))
            print(f"{len(done)} of {len(keys)} tasks, about {minutes:.0f} minutes to go", flush=True)
    for task, key in zip(tasks.values(), keys, strict=True):
        task |= {"output": done[key]} if key in done else {"output": "", "unfinished": "time limit"}
    Path(f"{args.out}.tmp").write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in tasks.values()), "utf-8", newline="\n")
    os.replace(f"{args.out}.tmp", args.out)
    if done.keys() >= set(keys):
        os.remove(f"{args.out}.part")
