"""mergekit 0.1.5 in a process of its own that answers many questions: its import takes seconds, an
answer milliseconds.

Tests import this module and ask `mergekit()`; run as a script by mergekit's Python, the same file
is the process that answers. A message is a length (8 bytes), JSON, a length, and tensors in
safetensors' format. mergekit's Python is EVOMERGE_MERGEKIT_PYTHON, else that of `mergekit-yaml` on
the PATH, else our own if mergekit imports there.
"""

import atexit
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

WITHOUT = "mergekit is not here: install mergekit==0.1.5 elsewhere and set EVOMERGE_MERGEKIT_PYTHON"


def send(stream, message, tensors=None):
    """One message; JSON writes floats so that they come back with every bit."""
    from safetensors.torch import save

    for part in (json.dumps(message).encode(), save(tensors or {})):
        stream.write(len(part).to_bytes(8, "little") + part)
    stream.flush()


def receive(stream):
    """(message, tensors by name), or None at the end of the stream."""
    from safetensors.torch import load

    parts = []
    for _ in range(2):
        size = stream.read(8)
        if len(size) < 8:
            return None
        parts.append(stream.read(int.from_bytes(size, "little")))
    return json.loads(parts[0]), load(parts[1])


class MergekitError(Exception):
    """What mergekit raised, as text."""


class Mergekit:
    """The client."""

    def __init__(self, python):
        import torch

        # As many threads as here: large sums depend on them in the last bit.
        environment = os.environ | {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [python, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        atexit.register(self.process.kill)

    def ask(self, message, tensors=None):
        """(answer, tensors). Raises MergekitError."""
        send(self.process.stdin, message, tensors)
        answer = receive(self.process.stdout)
        if answer is None:
            raise MergekitError(f"mergekit's process ended with code {self.process.wait()}")
        if "error" in answer[0]:
            raise MergekitError(answer[0]["error"])
        return answer

    def method(self, name, tensors, base, parameters, seed=0):
        """One merged tensor; `base` is the base's place in `tensors`, or None."""
        message = {
            "do": "method",
            "name": name,
            "base": base,
            "parameters": parameters,
            "seed": seed,
        }
        return self.ask(message, {str(i): tensor for i, tensor in enumerate(tensors)})[1]["out"]

    def merge(self, yaml_text, out, seed=0):
        """Run a configuration into the folder `out`."""
        self.ask({"do": "merge", "yaml": yaml_text, "out": str(out), "seed": seed})

    def read(self, yaml_text):
        """The configuration as mergekit's own objects hold it, as plain data."""
        return self.ask({"do": "read", "yaml": yaml_text})[0]["config"]


def find_python():
    """mergekit's Python, or None."""
    if named := os.environ.get("EVOMERGE_MERGEKIT_PYTHON"):
        return named
    if script := shutil.which("mergekit-yaml"):
        return str(Path(script).resolve().parent / "python")
    return sys.executable if importlib.util.find_spec("mergekit") else None


@functools.cache
def mergekit():
    """The one client of a test session; skips the test where there is no mergekit."""
    import pytest

    python = find_python()
    if python is None:
        pytest.skip(WITHOUT)
    return Mergekit(python)


def answer_method(message, tensors):
    import torch
    from mergekit import merge_methods
    from mergekit.merge_methods.base import TensorGroup

    group = TensorGroup.from_tensors(
        [tensors[str(i)] for i in range(len(tensors))], base_index=message["base"]
    )
    torch.manual_seed(message["seed"])
    (out,) = merge_methods.get(message["name"])([group], parameters=message["parameters"])
    return {}, {"out": out.contiguous()}


def answer_merge(message, _tensors):
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()  # a folder may hold other models now
    config = MergeConfiguration.model_validate(yaml.safe_load(message["yaml"]))
    run_merge(
        config,
        message["out"],
        MergeOptions(random_seed=message["seed"], quiet=True, clone_tensors=True),
        message["yaml"],
    )
    return {}, {}


def answer_read(message, _tensors):
    import yaml
    from mergekit.config import MergeConfiguration

    return {
        "config": MergeConfiguration.model_validate(yaml.safe_load(message["yaml"])).model_dump()
    }, {}


def serve():
    """Answer until the questions end. Whatever mergekit prints goes to stderr, out of the answers'
    way.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    doings = {"method": answer_method, "merge": answer_merge, "read": answer_read}
    while (question := receive(sys.stdin.buffer)) is not None:
        try:
            answer = doings[question[0]["do"]](*question)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}, {}
        send(answers, *answer)


if __name__ == "__main__":
    serve()
