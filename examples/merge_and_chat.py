"""Merge a mergekit configuration and talk to the merged model.

    python examples/merge_and_chat.py results/demo/best.yaml merged/
    python examples/merge_and_chat.py results/demo/best.yaml merged/ --say "逆順:あいう"

The folder is an ordinary transformers model: use it wherever such a model is used.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import evomerge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="a mergekit YAML")
    parser.add_argument("out", type=Path, help="the merged model; merged if it does not exist")
    parser.add_argument("--say", action="append", help="instead of typing; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    if not args.out.exists():
        evomerge.merge(args.config, args.out)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out)
    chat: list[dict[str, str]] = []
    for said in args.say or typed():
        chat.append({"role": "user", "content": said})
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True)
        chat.append({"role": "assistant", "content": answer})
        print(answer)


def typed() -> Iterator[str]:
    """Lines from the keyboard until Ctrl-D."""
    print("Type a message; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        yield line.strip()


if __name__ == "__main__":
    main()
