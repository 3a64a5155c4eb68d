"""One runtime with one model in a process of its own, timed on request.

    python worker.py RUNTIME FILE THREADS     # then a JSON line per request on standard input

A request has `ids` (the prompt), `text` (the same as text), `warm` (ids of another prompt) and
`new` (tokens to write); the answer has `first_token_ms` for `ids`, `tokens_per_s` after the first
token of `warm`, `peak_mb` and, at the start, `versions`. Greedy everywhere, end tokens ignored.

Knows each runtime's own calls. Does not know what is compared: it runs in whatever environment has
the runtime, so it imports nothing of ours but in `symbiont`.
"""

import ctypes
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

Times = list[float]
"""Seconds since the request at which each token was there."""


class Symbiont:
    """What a user of the SDK calls."""

    packages = ("onnxruntime", "onnxruntime-genai")

    def __init__(self, path: str, threads: int) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from edge_sdk import SlmSession

        self.session = SlmSession(path, threads=threads)

    def write(self, ids: list[int], text: str, new: int) -> Times:
        started = time.perf_counter()
        with self.session.stream(text, max_tokens=new) as answer:
            before = time.perf_counter() - started  # what stream() did before it began to count
            for _ in answer:
                pass
        if len(answer.tokens) < new and new > 1:
            raise RuntimeError(f"the answer ended after {len(answer.tokens)} tokens, not {new}")
        per_token = 1 / answer.tokens_per_s if new > 1 else 0.0
        return [before + answer.first_token_s + i * per_token for i in range(new)]


class Speculative(Symbiont):
    """The same with a draft model; FILE is "TARGET,DRAFT"."""

    def __init__(self, path: str, threads: int) -> None:
        target, draft = path.split(",")
        super().__init__(target, threads)
        from edge_sdk import SlmSession
        from edge_sdk.speculation import Speculator

        self.speculator = Speculator(self.session, SlmSession(draft, threads=threads))
        self.speculator.calibrate()

    def write(self, ids: list[int], text: str, new: int) -> Times:
        times, started = [], time.perf_counter()
        with self.speculator.stream(text, max_tokens=new) as answer:
            times.extend(time.perf_counter() - started for _ in answer)
        count = len(answer.tokens)
        if count < new:
            raise RuntimeError(f"the answer ended after {count} tokens, not {new}")
        if new == 1:
            return times[:1]
        step = (times[-1] - times[0]) / (count - 1)
        return [times[0] + i * step for i in range(count)]


class Genai:
    """onnxruntime-genai as its own examples use it."""

    packages = ("onnxruntime", "onnxruntime-genai")

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(path)
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        self.model = og.Model(config)

    def write(self, ids: list[int], text: str, new: int) -> Times:
        length = len(ids) + new
        started, times = time.perf_counter(), []
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self.og.Generator(self.model, params)
        generator.append_tokens(ids)
        for _ in range(new):
            generator.generate_next_token()
            int(generator.get_next_tokens()[0])
            times.append(time.perf_counter() - started)
        return times


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings, without its Python loop."""

    packages = ("llama-cpp-python",)

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self.c, self.np = llama_cpp, np
        self.log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def write(self, ids: list[int], text: str, new: int) -> Times:
        c = self.c
        c.llama_memory_clear(c.llama_get_memory(self.context), True)
        started, times, unread = time.perf_counter(), [], ids
        for _ in range(new):
            array = (c.llama_token * len(unread))(*unread)
            if c.llama_decode(self.context, c.llama_batch_get_one(array, len(unread))) != 0:
                raise RuntimeError("llama_decode failed")
            logits = c.llama_get_logits_ith(self.context, -1)
            best = int(self.np.ctypeslib.as_array(logits, (self.size,)).argmax())
            unread = [best]
            times.append(time.perf_counter() - started)
        return times


class Transformers:
    """transformers' generate() in PyTorch, in the precision the weights are stored in."""

    packages = ("torch", "transformers")

    def __init__(self, path: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()

    def write(self, ids: list[int], text: str, new: int) -> Times:
        prompt = self.torch.tensor([ids])
        started, times = time.perf_counter(), []

        def note(*_: Any, **__: Any) -> Any:
            times.append(time.perf_counter() - started)
            return self.torch.zeros(1, dtype=self.torch.bool)

        with self.torch.inference_mode():
            self.model.generate(
                prompt,
                attention_mask=self.torch.ones_like(prompt),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                stopping_criteria=[note],
            )
        return times


class Optimum(Transformers):
    """optimum-onnx: the graph its exporter makes, run by its own class."""

    packages = ("optimum-onnx", "onnxruntime", "transformers")

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.model = ORTModelForCausalLM.from_pretrained(path, session_options=options)


RUNTIMES: dict[str, Any] = {
    "symbiont": Symbiont,
    "speculative": Speculative,
    "genai": Genai,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "optimum-onnx": Optimum,
}


def peak_mb() -> float:
    """Most MiB this process ever held (Linux), else what getrusage says."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    """Serve requests until standard input ends."""
    name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    runtime = RUNTIMES[name](path, threads)
    versions = {package: version(package) for package in RUNTIMES[name].packages}
    answers.write(json.dumps({"versions": versions}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        runtime.write(request["ids"], request["text"], 1)  # others used the caches meanwhile
        first = runtime.write(request["ids"], request["text"], 1)[0]
        times = runtime.write(request["warm"], request["warm_text"], request["new"])
        rate = (len(times) - 1) / (times[-1] - times[0])
        found = {"first_token_ms": first * 1e3, "tokens_per_s": rate, "peak_mb": peak_mb()}
        answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
