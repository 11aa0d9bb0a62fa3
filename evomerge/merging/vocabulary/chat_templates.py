"""`chat_template:` of a recipe: the models' commonest, a built-in one, or the recipe's own."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import ModelError
from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.merging.vocabulary.tokenizers import read_tokenizer
from evomerge.recipe import Recipe

log = logging.getLogger(__name__)

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
# The formats of these names, written anew, each on one line: every blank counts. They give the
# prompts that mergekit 0.1.5's templates of the same names give, with their stray blanks and line
# breaks (exaone, llama3) and without a blank line before alpaca's last heading.
BUILT_IN = {
    "alpaca": (
        "{% set ns = namespace(system='') %}"
        "{% for m in messages if m['role'] == 'system' %}{% set ns.system = m['content'] %}"
        "{% endfor %}{{ ns.system | trim }}{{ '\\n\\n' }}"
        "{% set headings = {'user': 'Instruction', 'assistant': 'Response',"
        " 'user_context': 'Input'} %}"
        "{% for m in messages if m['role'] in headings %}"
        "{{ '### ' ~ headings[m['role']] ~ ':\\n' ~ m['content'] | trim }}"
        "{% if m is not sameas messages[-1] %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
        "{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}"
        "{{ '<|im_start|>%s\\n%s<|im_end|>\\n' | format(m['role'], m['content']) }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% if messages and messages[0]['role'] != 'system' %}"
        "{{ '        [|system|][|endofturn|]\\n\\n' }}{% endif %}"
        "{% for m in messages %}"
        "{{ '    [|%s|]%s\\n        ' | format(m['role'], m['content']) }}"
        "{% if m['role'] != 'user' %}{{ '[|endofturn|]' }}{% endif %}{{ '\\n\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '    [|assistant|]\\n' }}{% endif %}"
    ),
    "llama3": (
        "{% set head = '<|start_header_id|>%s<|end_header_id|>\\n\\n' %}"
        "{% if messages %}{{ bos_token }}{% endif %}"
        "{% for m in messages %}"
        "{{ head | format(m['role']) ~ m['content'] | trim ~ '<|eot_id|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ head | format('assistant') }}{% endif %}"
    ),
    "mistral": (
        "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
        "{{ bos_token }}"
        "{% for m in messages[first:] %}"
        "{% if m['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
        "{{ raise_exception('user and assistant must take turns, after one system turn at most') }}"
        "{% endif %}"
        "{% if m['role'] == 'assistant' %}{{ ' ' ~ m['content'] ~ eos_token }}"
        "{% else %}{{ ' [INST] ' }}"
        "{% if loop.first and first %}{{ messages[0]['content'] ~ '\\n\\n' }}{% endif %}"
        "{{ m['content'] ~ ' [/INST]' }}{% endif %}"
        "{% endfor %}"
    ),
}


def chat_template_of(recipe: Recipe, models: Mapping[str, ModelFolder]) -> str | None:
    """The merged model's template; None: the recipe says nothing, or no model has one."""
    asked = recipe.chat_template
    if asked is None or asked in BUILT_IN:
        return BUILT_IN.get(asked or "")
    return _commonest(models) if asked == "auto" else asked


def _commonest(models: Mapping[str, ModelFolder]) -> str | None:
    """The template that most of the models have, the earliest model's among equals."""
    count: Counter[str] = Counter()
    for ref, model in models.items():
        try:
            found = read_tokenizer(model.path, ref).chat_template
        except ModelError as error:
            log.warning("chat_template: auto goes without this model: %s", error)
            continue
        if isinstance(found, Mapping):
            found = found.get("default")
        if found:
            count[found.strip()] += 1
    return count.most_common(1)[0][0] if count else None


def write_chat_template(folder: Path, template: str) -> None:
    """Make a folder's tokenizer use this template, and no other. Raises OSError."""
    (folder / FILE).write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    for other in folder.glob("additional_chat_templates/*.jinja"):
        other.unlink()
    config = folder / CONFIG
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
            text = json.dumps(settings, indent=2, ensure_ascii=False)
            config.write_text(text + "\n", encoding="utf-8")
