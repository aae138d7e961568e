"""A tiny random model of each family, through everything that lorap does with a model: the table of docs/models.md.

``python tests/families.py`` writes the table, ``tests/test_families.py`` runs the same and compares.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import random_model
from torch import Tensor
from transformers import AutoConfig

import lorap
from lorap.architectures import ARCHITECTURES, PROJECTIONS, known_architecture, text_config
from lorap.checkpoint.load import find_model, load_model
from lorap.checkpoint.validate import model_class
from lorap.compression.layer import LayerCompressor
from lorap.compression.runs.run import RunOptions
from lorap.errors import LoRAPError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
# Half of its layers have no attention of ours.
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# Five experts, of which two are asked.
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "intermediate_size": 48}
NARROW: dict[str, Any] = EXPERTS | {"num_experts": 5, "moe_intermediate_size": 48}
ROUTED: dict[str, Any] = EXPERTS | {"n_routed_experts": 5, "moe_intermediate_size": 48}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "head_dim": 8}
LATENT |= {"intermediate_size": 100, "moe_intermediate_size": 96}
SPARSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
# Four layers: two of each kind of attention, the last two of which have no keys and values of their own and wider FFNs.
GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "global_head_dim": 32,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 500,
}
# What sets a family apart in ways that matter here.
OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": HYBRID,
    "mixtral": EXPERTS | {"num_local_experts": 5},
    "olmo_hybrid": HYBRID,
    "olmoe": EXPERTS | {"num_experts": 5},
    "qwen3_moe": NARROW,
    "mellum": NARROW,
    "qwen2_moe": NARROW | {"shared_expert_intermediate_size": 56},
    "qwen3_next": HYBRID | NARROW | {"shared_expert_intermediate_size": 56},
    "qwen3_5_moe_text": HYBRID | NARROW | {"shared_expert_intermediate_size": 56},
    "afmoe": NARROW | {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8},
    "cohere2_moe": EXPERTS | {"num_experts": 5, "num_shared_experts": 1, "sliding_window": 8},
    "dots1": ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_moe": NARROW | {"num_experts_per_tok": 2, "moe_num_shared_experts": 1},
    "exaone_moe": NARROW | {"num_shared_experts": 1, "sliding_window": 8},
    "glm4_moe": ROUTED | {"use_qk_norm": True},
    "hunyuan_v1_moe": EXPERTS | {"num_experts": 5},
    "beam": NARROW | SPARSE | SLIDING | {"n_group": 1, "topk_group": 1},
    "flint": NARROW | SLIDING | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 56},
    "hy_v3": NARROW,
    "kolibri1": NARROW | SLIDING | {"shared_expert_intermediate_size": 56},
    "laguna": NARROW
    | SPARSE
    | SLIDING
    | {
        "shared_expert_intermediate_size": 56,
        "num_attention_heads_per_layer": [4, 6],
        "moe_routed_scaling_factor": 2.5,
    },
    "mimo_v2_flash": ROUTED | SPARSE | SLIDING | {"num_key_value_heads": 1, "v_head_dim": 8},
    "minimax_m2": EXPERTS | {"num_local_experts": 5},
    "sarvam_moe": ROUTED | {"first_k_dense_replace": 1},
    "deepseek_v2": ROUTED | LATENT | {"q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek_v3": ROUTED | LATENT | {"q_lora_rank": 24, "first_k_dense_replace": 1},
    "deepseek_v32": ROUTED
    | LATENT
    | {"q_lora_rank": 24, "first_k_dense_replace": 1, "index_topk": 12, "index_head_dim": 16, "index_n_heads": 2},
    "glm4_moe_lite": ROUTED | LATENT | {"q_lora_rank": 24},
    "sarvam_mla": ROUTED | LATENT | {"q_lora_rank": None, "first_k_dense_replace": 1},
    # Half of their layers have linear attention.
    "kimi_linear": NARROW
    | LATENT
    | {"num_local_experts": 5, "layer_types": HYBRID["layer_types"], "linear_num_heads": 2, "linear_head_dim": 16},
    "bailing_hybrid": NARROW
    | LATENT
    | {"num_local_experts": 5, "layer_types": HYBRID["layer_types"], "first_k_dense_replace": 1},
    "solar_open": ROUTED,
    "flex_olmo": EXPERTS | {"num_experts": 5},
    "phimoe": EXPERTS | {"num_local_experts": 5},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "gemma4_text": GEMMA4,
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    "granite_swa": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    "glm": {"attention_bias": True},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True},
}
# Models that see: what their vision has, and of which family the language model is.
EYES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"hidden_size": 32, "intermediate_size": 40, "image_size": 28, "patch_size": 14}),
    "gemma4": (
        "gemma4_text",
        {"hidden_size": 32, "intermediate_size": 40, "head_dim": 16, "position_embedding_size": 16},
    ),
    "got_ocr2": (
        "qwen2",
        {"hidden_size": 32, "output_channels": 16, "image_size": 64, "patch_size": 16, "mlp_dim": 40, "window_size": 2},
    ),
    "idefics3": ("llama", {"hidden_size": 32, "intermediate_size": 40, "image_size": 28, "patch_size": 14}),
    "internvl": ("qwen2", {"hidden_size": 32, "intermediate_size": 40, "image_size": [28, 28], "patch_size": [14, 14]}),
    "llava": ("llama", {"hidden_size": 32, "intermediate_size": 40, "image_size": 28, "patch_size": 14}),
    "mistral3": ("mistral", {"hidden_size": 32, "intermediate_size": 40, "image_size": 28, "patch_size": 14}),
    "qwen2_vl": ("", {"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2}),
    "qwen2_5_vl": ("", {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 64, "depth": 1, "num_heads": 2}),
    "qwen3_5": (
        "qwen3_5_text",
        {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 64, "depth": 1, "num_heads": 2}
        | {"num_position_embeddings": 16},
    ),
    "qwen3_vl": (
        "",
        {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 64, "depth": 1, "num_heads": 2}
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "smolvlm": ("llama", {"hidden_size": 32, "intermediate_size": 40, "image_size": 28, "patch_size": 14}),
}
# Tokens whose embeddings are looked up whether there is an image or not.
PLACEHOLDERS = {"gemma4": {"image_token_id": 497, "video_token_id": 498, "audio_token_id": 499}}
SIGHT = {"num_hidden_layers": 1, "num_attention_heads": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
WINDOWS, SEQ_LEN = 8, 32
COLUMNS = (
    *("sparsity 0", "`lorap`", "`best`", "reload", "generate", "optimize"),
    *("`--format stock`", "`--format deci`", "`--format gguf`"),
)


def tiny(model_type: str, **overrides: Any) -> Any:
    """A random model of the family, the same on every call; no layer is close to the identity."""
    own = tiny_config(model_type, **overrides)
    return random_model(lambda: model_class(own).from_config(own))


def tiny_config(model_type: str, **overrides: Any) -> Any:
    options = SIZES | OPTIONS.get(model_type, {}) | overrides
    if model_type not in EYES:
        return AutoConfig.for_model(model_type, **options)
    family, vision = EYES[model_type]
    text = options | OPTIONS.get(family, {}) | ({"model_type": family} if family else MROPE)
    if model_type == "qwen3_5":
        text |= {
            "rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0, "mrope_interleaved": True}
        }
    kind = {"model_type": "clip_vision_model"} if model_type == "llava" else {}
    return AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=SIGHT | vision | kind,
        tie_word_embeddings=options["tie_word_embeddings"],
        **PLACEHOLDERS.get(model_type, {}),
    )


def windows() -> Tensor:
    """(8, 32) random tokens."""
    return torch.randint(2, SIZES["vocab_size"], (WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(windows()[:2]).logits
    return found


def written(model: Any) -> Tensor:
    """Six tokens."""
    tokens: Tensor = model.generate(windows()[:1, :9], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return tokens


def config(**options: Any) -> lorap.CompressionConfig:
    return lorap.CompressionConfig(num_calibration_samples=WINDOWS, calibration_seq_len=SEQ_LEN, **options)


def compressed(model_type: str, **options: Any) -> tuple[Any, lorap.CompressionReport]:
    return lorap.compress(tiny(model_type), calibration=windows(), config=config(**options), progress=False)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def assert_goes_on(model: Any, place: Path, monkeypatch: pytest.MonkeyPatch, *, before: int) -> None:
    """A run that is interrupted before a layer begins again there, and gives the bytes of one that was not."""
    model.save_pretrained(place / "dense")
    run, options = RunOptions(calibration=windows(), progress=False), config(recipe="lorap", sparsity=0.3)
    lorap.compress_to_folder(place / "dense", place / "whole", options, run)
    own, done = LayerCompressor.compress, []

    def stops(self: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        done.append(index)
        if done == list(range(before + 1)):
            raise KeyboardInterrupt
        return own(self, index, *args, **kwargs)

    monkeypatch.setattr(LayerCompressor, "compress", stops)
    with pytest.raises(KeyboardInterrupt):
        lorap.compress_to_folder(place / "dense", place / "small", options, run)
    lorap.compress_to_folder(place / "dense", place / "small", options, run)
    assert done == [*range(before + 1), *range(before, text_config(model.config).num_hidden_layers)]
    whole, small = ((place / name / "model.safetensors").read_bytes() for name in ("whole", "small"))
    assert whole == small


def check(model_type: str, place: Path, tokenizer: Any) -> dict[str, str]:
    """Everything with one family.

    Args:
        model_type: one of the architectures.
        place: an empty folder.
        tokenizer: for files that hold one.

    Returns:
        For each of ``COLUMNS`` "yes", or the sentence with which a recipe or an export was refused.

    Raises:
        AssertionError: something is not as it should be.
    """
    found = dict.fromkeys(COLUMNS[:6], "yes")
    dense = logits(tiny(model_type))
    same, _ = compressed(model_type, sparsity=0.0, correction_steps=0)
    assert torch.equal(logits(same), dense)
    for recipe in ("lorap", "best"):
        try:
            model, report = compressed(model_type, recipe=recipe, sparsity=0.3)
        except LoRAPError as error:
            found[f"`{recipe}`"] = str(error)
            continue
        expected = logits(model)
        assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
        assert 0.6 < report.param_ratio < 0.75
        if recipe == "lorap":  # as the command does it: one layer in memory
            tiny(model_type).save_pretrained(place / "dense")
            run = RunOptions(calibration=windows(), progress=False)
            lorap.compress_to_folder(place / "dense", place / recipe, config(recipe=recipe, sparsity=0.3), run)
        else:
            lorap.save(model, place / recipe, report=report)
        folder = load_model(find_model(place / recipe))
        opened = type(model).from_pretrained(place / recipe)
        assert torch.equal(logits(folder), expected)
        assert torch.equal(logits(opened), expected)
        assert_nothing_else_changed(opened, model_type)
        lorap.optimize_for_inference(opened)
        assert_close(logits(opened), expected)
        assert torch.equal(written(opened), written(model))
    exports: dict[str, Callable[[Any], Path]] = {
        "`--format stock`": lambda model: lorap.export_stock(model, place / "stock"),
        "`--format deci`": lambda model: lorap.export_deci(model, place / "deci"),
        "`--format gguf`": lambda model: lorap.export_gguf(model, place / "gguf", tokenizer=tokenizer),
    }
    for column, export in exports.items():
        model = load_model(find_model(place / "lorap"))
        found[column] = exported(model, export)
    return found


def assert_nothing_else_changed(model: Any, model_type: str) -> None:
    """All but the projections is what it was, bit by bit; of models that see also their vision."""
    before, found = tiny(model_type), model.state_dict()
    architecture = known_architecture(before, to="split", experts=True)
    layers = list(enumerate(architecture.decoder_layers(before)))
    names = [architecture.module_name(index, role) for index, _ in layers for role in PROJECTIONS]
    names += [architecture.ffn_name(*layer) for layer in layers]
    others = {n: t for n, t in before.state_dict().items() if not n.startswith(tuple(f"{m}." for m in names))}
    assert len(others) >= 2  # OLMo has an embedding and a head: its norms have no weights
    assert all(torch.equal(found[name], tensor) for name, tensor in others.items())


def exported(model: Any, export: Callable[[Any], Path]) -> str:
    """ "yes", or what an export says against the model; what it writes computes the same."""
    expected = logits(model)
    try:
        folder = export(model)
    except LoRAPError as error:
        return str(error)
    if not (folder / "configuration_deci.py").exists():  # its class is in other hosts, see tests/test_deci.py
        assert_close(logits(load_model(find_model(folder))), expected)
    return "yes"


def page(found: Mapping[str, Mapping[str, str]], before: str = "") -> str:
    """docs/models.md, from what :func:`check` found; families that did not run keep the row that they had ``before``."""
    header = ["family", "`model_type`", *COLUMNS]
    rows = {line.split("|")[2].strip(" `"): line for line in before.splitlines() if line.startswith("|")}
    for model_type, cells in found.items():
        words = ("yes" if cells[column] == "yes" else "refused" for column in COLUMNS)
        rows[model_type] = f"| {' | '.join([ARCHITECTURES[model_type].families, f'`{model_type}`', *words])} |"
    lines = [rows[model_type] for model_type in ARCHITECTURES if model_type in rows]
    table = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *lines]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    return PAGE_TEXT.format(
        count=len(lines),
        towers=sum(f"| `{name}` |" in "\n".join(lines) for name in EYES),
        versions=versions,
        table="\n".join(table),
    )


PAGE_TEXT = """# Models

{count} families, {towers} of which see, each as a tiny random model of its class in transformers, with {versions}.
`python tests/families.py` runs them and writes this page; `make test-all` fails where it is not true any more.

{table}

- In every cell all but the seven projections, or those of experts, is what it was, bit by bit.
- **sparsity 0**: with `--sparsity 0 --correction-steps 0` the logits are those of the dense model, bit for bit.
- **`lorap`, `best`**: both recipes at sparsity 0.3 remove what they are asked for.
- **reload**: saved and opened again by lorap and by `from_pretrained`, the logits are the same bits.
- **generate**, **optimize**: `lorap.optimize_for_inference` leaves the logits (within 0.0001 of the largest) and the tokens that
  are written. It fuses SiLU only; with another activation gate and up are two of lorap's products, and the rest of the FFN is the
  class's own. How long one token takes before and after is in [family_speed.md](../benchmarks/results/family_speed.md), one run
  on a busy machine with AVX2: dense models were 1.12 to 1.47 times as fast in float32 and 1.49 to 2.21 times in bfloat16,
  mixtures of experts 0.99 to 1.02 times (within one standard error of 1, or above) and 1.03 to 1.10 times.
- **exports**: what is written computes the same, opened as an ordinary model. "refused": with a sentence that says so, and
  nothing is written.
- **vLLM** 0.32.0 with lorap's plug-in serves `llama`, `mistral`, `qwen2`, `qwen3`, `smollm3`, `phi3`, `glm4`, `gemma`,
  `gemma3_text`, `granite`, `exaone4`, `ernie4_5`, `ministral3`, `olmo2`, `olmo3` and `seed_oss`: on a CPU, in float32, tokens and
  log-probabilities of tiny models are those of transformers ([how](inference.md#vllm)). It refuses the others by name; as
  `--format stock` a model is an ordinary one of its class. Tried and refused since vLLM's numbers are others: Gemma 2
  (log-probabilities differ by up to 0.15) and Command R, where vLLM has others for a dense model, too (0.29). GLM-4 of 2024, and
  StableLM with norms of heads, do not load.

Before anything is compressed, one layer of each kind is run on eight random tokens and compared with what lorap takes for
granted of the family ([the contract](../lorap/calibration/contract.py)): which linear layers read the same, that down reads
act(gate) * up and nothing else, that values reach o through v alone (k where those are the keys). A version of transformers
that computes a family in another way is refused, with the layer and the difference.

Of models that see, the language model is compressed, calibrated on text; vision and what joins them stay as they are, bit by
bit, and the files that tell how images become numbers are copied along. Tensors are written under the names that
transformers 5 has for them; older names, as most folders on the hub have, are read as well. Images go through compressed models
as through dense ones, after a reload and optimized too: `tests/test_images.py`, all of these but Gemma 4, GOT-OCR 2
and Mistral 3.

Qwen3.5, Qwen3.6 and OLMo Hybrid have attention in every fourth layer and something else in the others: FFNs are compressed in
all layers, attention where it is of q, k, v and o, and the rest stays, bit by bit. `--target stock` would take unlike shares
from their layers and is refused.

Gemma 4: the last layers of its small models have no keys and values of their own; they attend to those of an earlier layer,
which calibration and the backward pass hand over, and give up parameters of q and o alone. Where values are the keys, k stands
for both. FFNs may be twice as wide in some layers, and heads in layers of full attention. What each layer reads of its own
embedding stays as it is, bit by bit. Refused: `--target stock`, `--format stock` of FFNs that were pruned where layers had two
widths, and models with experts (`enable_moe_block`). `lorap plan` tells sizes and memory of unlike layers, and no time.

Phi-3, Phi-4 and GLM-4 store gate and up as one matrix, Phi also q, k and v. lorap splits them, row by row, and a compressed
folder holds them under the names that Llama has for them; `lorap export --format stock` joins them again. `--target stock` is
refused.

Mixtures of experts: each expert gives up channels of its own, by the tokens that reach it, weighted as the router weights them;
recipe `best` also refits each with these. All experts of a layer keep the same number, so that they stay packed, a multiple of
8, as grouped matmuls want it. Routers stay, bit by bit, and so do shared experts, which all tokens read. Layers that have one
FFN in place of experts, as the first of GLM-4.5, dots.llm1, ERNIE and others do, are compressed as in a dense model. An expert
that fewer than eight tokens of a part of the calibration text reach is judged on all tokens of its layer, and the run says how
many there were. Correction steps move attention, and FFNs that are no experts. `lorap inspect` draws one line for the experts
of a layer, the mean of their spectra. There is no int8, int4, `--size`, `--target stock`, `recover` or export for them yet:
each is refused. All of this is seen on tiny random models, and on no trained one from outside.

DeepSeek-V2, V3 and V3.2, GLM-4.7-Flash, Kimi Linear, Ling and Sarvam with latent attention: their experts are compressed, and
FFNs of layers that have one. Attention stays, bit by bit, be it latent, whose projections are low-rank products already, or
linear as in most layers of Kimi Linear and Ling; a sparsity is of the FFNs alone, and `--sublayers self_attn` is refused. Experts
whose files are in fp8, as those of DeepSeek-V3 are, cannot be read yet.

Weights that another program has quantized are read as the floating-point numbers that they stand for, a layer at a time: fp8
(DeepSeek's and Qwen's blocks, or one scale), compressed-tensors (`float-quantized`, `int-quantized`, `naive-quantized`, and
`pack-quantized` of 4 and 8 bits), AWQ (`gemm`) and GPTQ (2, 4 and 8 bits). Each is compared with its formula in float64, and
eight models that compressed-tensors 0.20.1 had quantized with what it reads back itself: the same numbers. What comes out is in
floating point. bitsandbytes, mxfp4, nvfp4, 3 bits, and weights that are sparse or rotated besides are refused.

Not among them, and refused with the reason: FFNs without a gate (Apertus, Arcee, GPT-NeoX, Jais 2, Nemotron, Phi-2), with a
norm inside (BitNet, Dory), with scales (Falcon-H1) or clamps (MiniMax-M3) around the gate; experts that have biases (GPT-OSS) or
are packed the other way round (Aria, Llama 4, whose experts besides read what the router has scaled); layers that run several
times (HRM), stand in several places (Zamba), hand choices of tokens on (GLM-5) or attend to images alone (Llama 3.2 with vision);
adapters for what is no text (Phi-4 multimodal). State spaces are refused as well. Other families are a row in
`lorap/architectures/` away.
"""


def main() -> None:
    """All families, or those that are named."""
    from conftest import make_tokenizer

    tokenizer = make_tokenizer()
    for model_type in sys.argv[1:] or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as place:
            found = check(model_type, Path(place), tokenizer)
        print(model_type, {column: cell for column, cell in found.items() if cell != "yes"}, flush=True)
        PAGE.write_text(page({model_type: found}, PAGE.read_text("utf-8") if PAGE.exists() else ""), "utf-8")


if __name__ == "__main__":
    main()
