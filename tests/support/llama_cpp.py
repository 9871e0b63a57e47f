"""llama.cpp itself, through the wheel `xllamacpp`: its tokenizer and its greedy tokens."""

import json
import urllib.request

import pytest


class LlamaCpp:
    """A GGUF file loaded by llama.cpp."""

    def __init__(self, path, context=256):
        xllamacpp = pytest.importorskip("xllamacpp", reason="compares with llama.cpp (pip install xllamacpp)")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port = context, 1, 0
        params.cpuparams.n_threads, params.n_gpu_layers, params.warmup = 1, 0, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def _ask(self, where, **what):
        request = urllib.request.Request(
            f"{self._server.listening_address}/{where}",
            data=json.dumps(what).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text, *, add_special):
        return self._ask("tokenize", content=text, add_special=add_special, parse_special=True)["tokens"]

    def greedy(self, ids, count):
        """The greedy tokens after a prompt of ids, until one that ends the answer."""
        settings = {"temperature": 0, "n_predict": count, "cache_prompt": False, "return_tokens": True}
        return self._ask("completion", prompt=list(ids), samplers=["temperature"], **settings)["tokens"]

    def scored(self, ids, count):
        """As `greedy`, and for each token the log-probabilities of the likeliest ones by id."""
        settings = {"temperature": 0, "n_predict": count, "cache_prompt": False, "return_tokens": True}
        made = self._ask("completion", prompt=list(ids), samplers=["temperature"], n_probs=5, **settings)
        steps = made["completion_probabilities"]
        return [step["id"] for step in steps], [
            {one["id"]: one["logprob"] for one in step["top_logprobs"]} for step in steps
        ]
