"""GGUF files of every architecture that is read: against transformers, and against llama.cpp itself."""

import json

import numpy as np
import pytest

from tests.support import tiny_tokenizers
from tests.support.gguf_models import write_model
from tests.support.llama_cpp import LlamaCpp

gguf = pytest.importorskip("gguf", reason="writes GGUF files with the gguf package (pip install gguf)")
torch = pytest.importorskip("torch", reason="needs the [export] extra")

import onnx_ir as ir  # noqa: E402
import transformers  # noqa: E402

import trimserve  # noqa: E402
from tests.support.gguf_decoders import CASES, LAYERS, PROMPT, fields, make_model  # noqa: E402
from tests.support.models import PLAIN_EXPORTER  # noqa: E402
from tests.support.quantized_graphs import matrices  # noqa: E402
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError  # noqa: E402
from trimserve.folder.opening import open_folder  # noqa: E402
from trimserve.model.resolve import resolve_model  # noqa: E402
from trimserve.runtime.cold_rows import ColdRows  # noqa: E402
from trimserve.text.chat import render_chat  # noqa: E402
from trimserve.vocab.map import VocabMap  # noqa: E402
from trimserve_export.serving.quantize import scheme_of  # noqa: E402
from trimserve_export.source.whole import whole_source  # noqa: E402

pytestmark = pytest.mark.export


def rope_factors(config):
    """The tensor that llama.cpp's converter makes of Llama 3's settings, by transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    theta, width = 5e5, config.head_dim
    plain = 1 / theta ** (torch.arange(0, width, 2).float() / width)
    return (plain / scaled).numpy().astype(np.float32)


def write(case, model, path, **settings):
    architecture, _, _, metadata = CASES[case]
    extra = {"rope_freqs.weight": rope_factors(model.config)} if case == "llama-3.2" else {}
    settings = {"metadata": metadata, "bos": 1, "eos": 2, "padding": 0} | settings
    return write_model(path, model, architecture, fields(), extra=extra, **settings)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def load(path):
    with whole_source(resolve_model(path)) as whole:
        return transformers.AutoModelForCausalLM.from_pretrained(whole.path, dtype=torch.float32).eval()


def test_every_architecture_is_the_model_that_was_written(case, tmp_path):
    model = make_model(case)
    found = load(write(case, model, tmp_path / "m.gguf"))
    assert type(found) is type(model)
    stored = found.state_dict()
    for name, weight in model.state_dict().items():
        # A norm that is stored with 1 added has lost its lowest bits; all else is the same to the bit.
        lost = 2**-23 if "gemma" in case and name.endswith("norm.weight") else 0
        assert (stored[name] - weight).abs().max() <= lost, name
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        difference = (found(ids).logits - model(ids).logits).abs().max()
    assert difference <= (1e-4 if "gemma" in case else 0)


@pytest.mark.realmodel
def test_llama_cpp_says_the_same(case, tmp_path):
    model = make_model(case)
    path = write(case, model, tmp_path / "m.gguf")
    ends = resolve_model(path).read_json("generation_config.json")["eos_token_id"]
    full, theirs, compared = load(path), LlamaCpp(path), 0
    for prompt in (PROMPT, PROMPT[::-1], PROMPT[3:] * 2):
        ids = torch.tensor([prompt])
        # Ends are left in, and what comes after one is not compared.
        expected = full.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        tokens = expected[0, len(prompt) :].tolist()
        until = next((place for place, id_ in enumerate(tokens) if id_ in ends), len(tokens))
        assert theirs.greedy(prompt, 24)[:until] == tokens[:until]
        compared += until
    assert compared > 20


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_quantised_rows_are_transformers_own(kind, tmp_path):
    model = make_model("llama")
    path = write("llama", model, tmp_path / "m.gguf", kind=kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ours = load(path).state_dict()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours[name], weight), name


@pytest.mark.parametrize("case", ["llama", "qwen3"], indirect=True)
def test_a_gguf_file_becomes_a_folder_that_generates_the_same(case, tmp_path):
    model = make_model(case)
    path = write(case, model, tmp_path / "m.gguf", kind="Q8_0", template=tiny_tokenizers.CHAT_TEMPLATE)
    source = resolve_model(path)
    kept = np.unique([*range(0, 300, 2), *range(source.vocab_size - 50, source.vocab_size)]).astype(np.int32)
    vocab = VocabMap(kept, np.zeros(len(kept), np.uint8), source.vocab_size, source.tokenizer_sha256)
    result = trimserve.export(path, vocab, tmp_path / "out", progress=False)
    manifest = json.loads((tmp_path / "out" / "trimserve.json").read_text("utf-8"))
    assert list(manifest["source"]["files"]) == ["m.gguf"]
    assert manifest["source"]["name"] == str(path)
    full = transformers.AutoModelForCausalLM.from_pretrained(
        load_folder(path, tmp_path / "full"), dtype=torch.float32
    ).eval()
    generator = trimserve.load(result.path)
    for prompt in ("The cat sat on", "int main() {", "Ελλάδα 🎉"):
        ids = torch.tensor([source.tokenizer().encode(prompt).ids])
        expected = full.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
        assert list(generator.generate([prompt], max_new_tokens=16)[0].ids) == expected
    messages = [{"role": "user", "content": "latte"}]
    assert render_chat(generator.folder, messages).endswith("latte<|end|>\n<|turn|>assistant\n")


# As llama.cpp's Q4_K_M has them, some matrices have more bits than most; queries, keys and values, of which a
# fused graph makes one product, have three formats.
MIXED = {"q_proj": "Q4_1", "k_proj": "Q5_K", "v_proj": "Q6_K", "o_proj": "Q5_1", "down_proj": "Q3_K"}
MIXED |= {"lm_head": "Q6_K", "embed_tokens": "Q2_K"}
WIDE = {"hidden_size": 256, "intermediate_size": 256}


@pytest.mark.parametrize(
    ("kind", "kinds", "name", "eights"),
    [
        ("Q8_0", {}, "int8", None),
        ("Q4_0", {}, "int4", ["lm_head"]),
        ("Q4_0", {"v_proj": "Q8_0", "down_proj": "Q8_0"}, "int4", ["v_proj", "down_proj", "lm_head"]),
        # As SmolLM2's file.
        ("Q4_1", dict.fromkeys(("embed_tokens", "lm_head"), "Q8_0"), "int4", ["lm_head"]),
        ("Q4_K", MIXED, "int4", ["k_proj", "v_proj", "o_proj", "lm_head"]),
        ("Q5_0", MIXED, "int8", None),
    ],
)
def test_blocks_are_kept_by_quantize(kind, kinds, name, eights, tmp_path):
    """Every row of the graph's matrices and the cold ones, dequantised, is one of the file's, to the bit.

    Matrices that read one input are one in a fused graph, with the most bits that one of them has.
    """
    path = write(
        "llama",
        make_model("llama", **(WIDE if kinds is MIXED else {})),
        tmp_path / "m.gguf",
        kind=kind,
        kinds=kinds,
    )
    source = resolve_model(path)
    kept = np.arange(0, 300, 2, dtype=np.int32)
    vocab = VocabMap(kept, np.zeros(len(kept), np.uint8), source.vocab_size, source.tokenizer_sha256)
    out = trimserve.export(
        path, vocab, tmp_path / "out", quantize=name, exporter=PLAIN_EXPORTER, progress=False
    ).path
    tables = {tensor.name: theirs(tensor) + np.float32(0) for tensor in gguf.GGUFReader(path).tensors}
    expected = {row.tobytes() for matrix in tables.values() if matrix.ndim == 2 for row in matrix}
    graph = ir.load(out / "model.onnx").graph
    found = list(matrices(graph))
    fused = any(node.op_type == "GroupQueryAttention" for node in graph)
    assert len(found) == (4 if fused else 7) * LAYERS + 1
    parts = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    if not fused:
        parts = [{part} for group in parts for part in group]
    several = len(found) if eights is None else sum(bool(part & {*eights}) for part in parts) * LAYERS + 1
    assert sum(scheme_of(node).bits == 8 for node, _ in found) == several
    for _, rows in found:
        assert {row.tobytes() for row in rows} <= expected
    cold, ids = ColdRows(open_folder(out)), vocab.cold_ids
    assert np.array_equal(cold.head(ids), tables["output.weight"][ids])
    assert np.array_equal(cold.embedding(ids), tables["token_embd.weight"][ids])
    assert trimserve.verify(out, progress=False).ok


def theirs(tensor):
    """A tensor's numbers by the gguf package, its query and key rows as the file has them."""
    return gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)


def test_a_tokenizer_is_cut_as_any_other(tmp_path):
    path = write("llama", make_model("llama"), tmp_path / "m.gguf", bos=316, eos=318, padding=316)
    source = resolve_model(path)
    vocab = VocabMap.everything(source.vocab_size)
    out = trimserve.export(path, vocab, tmp_path / "out", layout="tokenizer", progress=False).path
    cut = transformers.AutoTokenizer.from_pretrained(out)
    for text in ("The cat<|end|>", "int main() {\n", "🎉"):
        assert cut(text)["input_ids"] == source.tokenizer().encode(text).ids


def load_folder(path, folder):
    folder.mkdir()
    source = resolve_model(path)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((source.path / name).read_bytes())
    source.gguf.write_weights(folder / "model.safetensors")
    return folder


def test_transformers_loads_the_tokenizer_with_the_same_ids(tmp_path):
    path = write("llama", make_model("llama"), tmp_path / "m.gguf", template=tiny_tokenizers.CHAT_TEMPLATE)
    source = resolve_model(path)
    theirs = transformers.AutoTokenizer.from_pretrained(source.path)
    for text in ("", "The cat\n\n  sat", "<|turn|>user 12345 'S", "🎉 ē\x13"):
        assert theirs(text)["input_ids"] == source.tokenizer().encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.chat_template == tiny_tokenizers.CHAT_TEMPLATE


def test_inspect_reads_the_header_alone(tmp_path):
    path = write("llama", make_model("llama"), tmp_path / "m.gguf", kind="Q8_0")
    facts = trimserve.inspect(path, kept=64)
    rows = len(fields()["tokens"])
    assert (facts.vocab_size, facts.tied, facts.hidden_size) == (rows, False, 64)
    assert [(tensor.role, tensor.dtype, tensor.bytes) for tensor in facts.vocab_tensors] == [
        ("embedding", "Q8_0", rows * 64 // 32 * 34),
        ("head", "Q8_0", rows * 64 // 32 * 34),
    ]
    assert facts.prize.decode_ratio > 1


REFUSED = {
    "an architecture that is not known": ({"general.architecture": "mamba"}, "'mamba'.*llama, qwen2"),
    "one part of several": ({"split.count": 3}, "3 parts.*llama-gguf-split"),
    "an adapter": ({"general.type": "adapter"}, "'adapter'.*language model"),
    "experts": ({"llama.expert_count": 8}, "mixture of experts"),
    "a scaling that is not known": ({"llama.rope.scaling.type": "dynamo"}, "'dynamo'"),
    "half of a head rotated": ({"llama.rope.dimension_count": 8}, "rotates 8 of 16"),
    "keys wider than values": ({"llama.attention.value_length": 32}, "different widths"),
    "a width of its own in each layer": ({"llama.feed_forward_length": [1, 2]}, "layer to layer"),
    "no width": ({"llama.embedding_length": 0}, "embedding_length is 0"),
    "another width": ({"llama.embedding_length": 128}, "width 128, found"),
    "more layers than tensors": ({"llama.block_count": 1 << 30}, "tensors for 1,073,741,824 layers"),
    "more layers": ({"llama.block_count": 3}, "lacks blk.2."),
    "fewer layers": ({"llama.block_count": 1}, "has 'blk.1."),
    "more heads": ({"llama.attention.head_count_kv": 4}, "attn_k.weight should be 64 x 64"),
    "a rope base that is no number": ({"llama.rope.freq_base": float("nan")}, "finite number"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write("llama", make_model("llama"), tmp_path_factory.mktemp("gguf") / "m.gguf")


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_is_not_read_is_refused_in_one_sentence(what, plain, tmp_path):
    changes, message = REFUSED[what]
    with pytest.raises((UnsupportedModelError, MismatchError), match=message) as caught:
        resolve_model(rewritten(plain, changes, tmp_path / "m.gguf"))
    assert "\n" not in str(caught.value)


def rewritten(path, changes, target):
    """A copy of a file with other metadata."""
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    types = {name: field.types[0] for name, field in reader.fields.items()}
    writer = gguf.GGUFWriter(target, changes.get("general.architecture", "llama"))
    for name, value in (values | changes).items():
        kind = {
            int: gguf.GGUFValueType.UINT32,
            str: gguf.GGUFValueType.STRING,
            list: gguf.GGUFValueType.ARRAY,
        }
        if name != "general.architecture":
            guessed = kind.get(type(value), gguf.GGUFValueType.FLOAT32)
            writer.add_key_value(name, value, guessed if name in changes else types[name])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_revision_of_a_file_and_a_folder_with_one_are_refused(plain):
    with pytest.raises(UsageError, match="no revisions"):
        resolve_model(plain, revision="main")
    with pytest.raises(UnsupportedModelError, match=r"pass -m .*m\.gguf"):
        _ = resolve_model(plain.parent).weight_files
