"""One process of the peers benchmark, run by the peer's own interpreter: generate greedily with one tool.

Only the tool and numpy are imported. After the line that says it is ready, each line of stdin is a request
``{"ids": [...], "tokens": n}`` and is answered with ms a token after the first, ms to the first, the ids and
the memory of this process.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# A tool: prompt ids -> generated ids, one at a time, without end.
Tool = Callable[[list[int]], Iterator[int]]


def optimum(folder: Path, threads: int) -> Tool:
    """ORTModelForCausalLM of optimum, a step at a time with its own cache."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    torch.set_num_threads(threads)
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def run(prompt: list[int]) -> Iterator[int]:
        ids, past = torch.tensor([prompt]), None
        count = len(prompt)
        with torch.no_grad():
            while True:
                mask = torch.ones((1, count), dtype=torch.int64)
                positions = torch.arange(count - ids.shape[1], count)[None]
                output = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past
                )
                past = output.past_key_values
                best = int(output.logits[0, -1].argmax())
                yield best
                ids, count = torch.tensor([[best]]), count + 1

    return run


def genai(folder: Path, threads: int) -> Tool:
    """Onnxruntime-genai on a folder of its own builder; `threads` stand in its genai_config.json."""
    runtime = importlib.import_module("onnxruntime_genai")
    del threads
    model = runtime.Model(str(folder))

    def run(prompt: list[int]) -> Iterator[int]:
        params = runtime.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + 512, do_sample=False)
        generator = runtime.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return run


def plain(folder: Path, threads: int) -> Tool:
    """A graph in ONNX Runtime with the shortest loop; `ids.json`, if there, lists the ids of a pruned one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, ["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    past_names = [name for name in inputs if name.startswith("past_key_values.")]
    outputs = ["logits", *(name.replace("past_key_values.", "present.") for name in past_names)]
    listed = folder / "ids.json"
    kept = json.loads(listed.read_text("utf-8")) if listed.exists() else None
    compact = {id_: place for place, id_ in enumerate(kept)} if kept else None

    def run(prompt: list[int]) -> Iterator[int]:
        fed = [compact[id_] for id_ in prompt] if compact else prompt
        past = [np.zeros((1, inputs[n].shape[1], 0, inputs[n].shape[3]), np.float32) for n in past_names]
        count = 0
        while True:
            count += len(fed)
            known = {
                "input_ids": np.array([fed], np.int64),
                "attention_mask": np.ones((1, count), np.int64),
                "position_ids": np.arange(count - len(fed), count)[None],
            }
            feeds = {name: value for name, value in known.items() if name in inputs}
            logits, *past = session.run(outputs, feeds | dict(zip(past_names, past, strict=True)))
            best = int(logits[0, -1].argmax())
            yield kept[best] if kept else best
            fed = [best]

    return run


TOOLS = {"optimum": optimum, "genai": genai, "plain": plain}


def generate(tool: Tool, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Time one answer of so many tokens; an end-of-text token does not end it."""
    begin = time.perf_counter_ns()
    steps = tool(prompt)
    ids = [next(steps)]
    first = time.perf_counter_ns()
    ids += [token for _, token in zip(range(tokens - 1), steps, strict=False)]
    end = time.perf_counter_ns()
    ms = (end - first) / 1e6 / max(1, len(ids) - 1)
    return {"ms": ms, "first_ms": (first - begin) / 1e6, "ids": ids, "memory": memory()}


def memory() -> dict[str, int | None]:
    """VmRSS, RssAnon, RssFile and VmHWM in bytes, where the system tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {"resident": None, "anonymous": None, "file": None, "peak": None}
    fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines() if ":" in line)
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {key: 1024 * int(fields[name].split()[0]) for key, name in names.items()}


def main() -> int:
    """Load, then answer requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=sorted(TOOLS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    begin = time.perf_counter()
    tool = TOOLS[args.tool](args.folder, args.threads)
    print(json.dumps({"load_ms": 1e3 * (time.perf_counter() - begin)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(generate(tool, request["ids"], request["tokens"])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
