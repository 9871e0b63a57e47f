"""What an option that does not exist was probably meant to be: a word of another library, or a slip."""

import difflib
from collections.abc import Collection

# Words of transformers, sentence-transformers, vLLM, OpenAI's API, llama.cpp and others -> ours; the first
# that a function has is named.
WORDS: dict[str, tuple[str, ...]] = {
    "max_tokens": ("max_new_tokens", "max_length"),
    "max_output_tokens": ("max_new_tokens",),
    "max_completion_tokens": ("max_new_tokens",),
    "max_generated_tokens": ("max_new_tokens",),
    "max_gen_len": ("max_new_tokens",),
    "n_predict": ("max_new_tokens",),
    "num_predict": ("max_new_tokens",),
    "min_tokens": ("min_new_tokens",),
    "top_n": ("top_k", "top"),
    "topk": ("top_k",),
    "k": ("top_k",),
    "p": ("top_p",),
    "topp": ("top_p",),
    "nucleus": ("top_p",),
    "temp": ("temperature",),
    "repeat_penalty": ("repetition_penalty",),
    "stop_sequences": ("stop",),
    "stop_words": ("stop",),
    "stopping_strings": ("stop",),
    "stop_token_ids": ("eos_token_id",),
    "end_id": ("eos_token_id",),
    "ignore_eos": ("eos_token_id",),
    "random_seed": ("seed",),
    "random_state": ("seed",),
    "generator": ("seed",),
    "beams": ("num_beams",),
    "beam_size": ("num_beams",),
    "beam_width": ("num_beams",),
    "use_beam_search": ("num_beams",),
    "sampling": ("do_sample",),
    "sample": ("do_sample",),
    "logits_processors": ("logits_processor",),
    "prefix_allowed_tokens_fn": ("logits_processor",),
    "bad_words": ("bad_words_ids",),
    "input": ("texts", "prompts", "prompt"),
    "inputs": ("texts", "prompts", "prompt"),
    "sentences": ("texts",),
    "text": ("texts", "prompts", "prompt"),
    "queries": ("texts", "query"),
    "conversation": ("messages",),
    "history": ("messages",),
    "normalize_embeddings": ("normalize",),
    "dimensions": ("truncate_dim",),
    "dim": ("truncate_dim",),
    "function_to_apply": ("function",),
    "activation_fn": ("apply_softmax", "function"),
    "activation_fct": ("apply_softmax", "function"),
    "aggregation_strategy": ("aggregation",),
    "return_all_scores": ("top_k",),
    "column": ("text_column",),
    "field": ("text_column",),
    "content_column": ("text_column",),
    "num_workers": ("workers",),
    "num_proc": ("workers",),
    "n_jobs": ("workers",),
    "processes": ("workers",),
    "num_threads": ("threads",),
    "n_threads": ("threads",),
    "intra_op_num_threads": ("threads",),
    "provider": ("device",),
    "providers": ("device",),
    "execution_provider": ("device",),
    "device_map": ("device",),
    "use_gpu": ("device",),
    "torch_dtype": ("dtype",),
    "precision": ("quantize", "dtype"),
    "quantization": ("quantize",),
    "force": ("overwrite",),
    "exist_ok": ("overwrite",),
    "output_dir": ("output",),
    "model_id": ("model",),
    "model_name_or_path": ("model", "path"),
    "folder": ("path",),
    "keep": ("keep_tokens", "keep_ids"),
    "vocab_size": ("top_k",),
    "show_progress_bar": ("progress",),
}
# What has no word here: what to do instead.
SENTENCES: dict[str, str] = {
    **dict.fromkeys(
        ("n", "best_of", "num_return_sequences"),
        "each prompt gets one answer: pass the prompt as often as you want answers, and other seeds",
    ),
    **dict.fromkeys(("logprobs", "output_scores", "return_dict_in_generate"), "call score() instead"),
    **dict.fromkeys(("streamer", "stream"), "call stream() instead"),
    **dict.fromkeys(
        ("skip_special_tokens", "clean_up_tokenization_spaces"),
        "a text never has special tokens: decode the result's ids with codec.decode()",
    ),
    **dict.fromkeys(
        ("convert_to_tensor", "convert_to_numpy", "return_tensors", "output_value"),
        "the result is always a numpy array: leave it out",
    ),
    **dict.fromkeys(("show_progress_bar", "verbose", "use_tqdm"), "no bar is shown: leave it out"),
    **dict.fromkeys(
        ("attention_mask", "input_ids", "inputs_embeds", "prompt_token_ids"),
        "prompts are texts, and the folder's tokenizer reads them",
    ),
    "device": "the device is chosen by trimserve.load(path, device=...)",
    "use_cache": "keys and values are always kept: leave it out",
    "pad_token_id": "a prompt is never padded: leave it out",
    "tools": "pass what the template reads to trimserve.text.chat.render_chat",
}


def meant(name: str, known: Collection[str], where: str) -> str:
    """The sentence about an unknown option.

    Args:
        name: what was given.
        known: what there is.
        where: the function's name.
    """
    start = f"unknown option {name} of {where}()"
    fitting = {word: next((to for to in ours if to in known), None) for word, ours in WORDS.items()}
    words = {word: to for word, to in fitting.items() if to} | {word: word for word in known}
    if name in words:
        return f"{start}: did you mean {words[name]}?"
    if name in SENTENCES:
        return f"{start}: {SENTENCES[name]}."
    if near := difflib.get_close_matches(name.lower(), sorted(words), n=1, cutoff=0.7):
        return f"{start}: did you mean {words[near[0]]}?"
    return f"{start}: it takes {', '.join(sorted({*known} - {'self'}))}."
