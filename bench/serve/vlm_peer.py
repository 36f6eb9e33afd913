"""A Qwen2.5-VL folder in another runtime, in an environment that has nothing of ours: run by `bench.serve` as a file.

    python vlm_peer.py mistralrs|xllamacpp|onnxruntime-genai CHECKPOINT FOLDER

FOLDER takes what the runtime needs in another form: for mistral.rs a config.json of the older, flat kind; for llama.cpp two GGUF
files in float32. Each line on standard input is {"image": FILE, "question": text, "tokens": at most so many}; the answer is greedy.
"""

import base64
import importlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Answer = Callable[[dict[str, Any]], tuple[str, int]]
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def mistralrs_answer(checkpoint: Path, folder: Path) -> Answer:
    os.environ |= {"MISTRALRS_CPU_KV_F32": "1", "RAYON_NUM_THREADS": "1"}
    rs: Any = importlib.import_module("mistralrs")
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    config = read(checkpoint / "config.json")
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    config["vision_config"] = vision | {"in_chans": vision["in_channels"], "spatial_patch_size": vision["patch_size"]}
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": "float32"}
    flat |= {"sliding_window": flat["max_position_embeddings"], "vision_token_id": config["vision_end_token_id"]}
    (folder / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    size = read(checkpoint / "preprocessor_config.json")
    pixels = {"min_pixels": size["size"]["shortest_edge"], "max_pixels": size["size"]["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(size | pixels), encoding="utf-8")
    runner = rs.Runner(which=rs.Which.MultimodalPlain(model_id=str(folder), arch=rs.MultimodalArchitecture.Qwen2_5VL))

    def answer(work: dict[str, Any]) -> tuple[str, int]:
        image = {"type": "image_url", "image_url": {"url": work["image"]}}
        content = [image, {"type": "text", "text": PICTURE + work["question"]}]  # it puts no place for the image itself
        asked = {"model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": work["tokens"]}
        given = runner.send_chat_completion_request(rs.ChatCompletionRequest(**asked, temperature=0.0))
        ended = given.choices[0].finish_reason == "stop"  # it counts the token that ends
        return given.choices[0].message.content, given.usage.completion_tokens - ended

    return answer


def xllamacpp_answer(checkpoint: Path, folder: Path) -> Answer:
    llama: Any = importlib.import_module("xllamacpp")
    folder.mkdir(parents=True, exist_ok=True)
    write_language_gguf(checkpoint, folder / "model.gguf")
    write_vision_gguf(checkpoint, folder / "mmproj.gguf")
    params = llama.CommonParams()
    params.model.path, params.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
    params.mmproj_use_gpu, params.n_gpu_layers, params.n_ctx, params.n_parallel = False, 0, 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.chat_template = read(checkpoint / "chat_template.json")["chat_template"]
    params.use_jinja = True
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)

    def answer(work: dict[str, Any]) -> tuple[str, int]:
        uri = "data:image/png;base64," + base64.b64encode(Path(work["image"]).read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": work["question"]}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": work["tokens"], "temperature": 0}
        given = server.handle_chat_completions({**body, "cache_prompt": False})
        given = json.loads(given) if isinstance(given, str | bytes) else given
        if "choices" not in given:
            raise RuntimeError(str(given)[:200])
        ended = given["choices"][0]["finish_reason"] == "stop"
        return given["choices"][0]["message"]["content"], given["usage"]["completion_tokens"] - ended

    return answer


MLP = {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
LANGUAGE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output", **MLP}
LANGUAGE |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}
TOWER = {"norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out", **{f"attn.{part}": f"attn_{part}" for part in "qkv"}, **MLP}


def write_language_gguf(checkpoint: Path, file: Path) -> None:
    """The language model and its tokenizer, as llama.cpp's architecture qwen2vl."""
    gguf: Any = importlib.import_module("gguf")
    whole, tokenizer, weights = read(checkpoint / "config.json"), read(checkpoint / "tokenizer.json"), load(checkpoint)
    config, writer = whole["text_config"], gguf.GGUFWriter(str(file), "qwen2vl")
    add_numbers(
        writer,
        "qwen2vl.",
        context_length=config["max_position_embeddings"],
        embedding_length=config["hidden_size"],
        block_count=config["num_hidden_layers"],
        feed_forward_length=config["intermediate_size"],
        attention__head_count=config["num_attention_heads"],
        attention__head_count_kv=config["num_key_value_heads"],
        attention__layer_norm_rms_epsilon=float(config["rms_norm_eps"]),
        rope__freq_base=float(config["rope_parameters"]["rope_theta"]),
    )
    writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])
    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    kind, size = gguf.TokenType, len(weights["model.embed_tokens.weight"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([added.get(i, tokens.get(i, f"[PAD{i}]")) for i in range(size)])
    writer.add_token_types([kind.CONTROL if i in added else kind.NORMAL if i in tokens else kind.UNUSED for i in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    if not whole["tie_word_embeddings"]:
        writer.add_tensor("output.weight", weights["lm_head.weight"])
    add_layers(writer, weights, "model.layers.", "blk.", LANGUAGE)
    save(writer)


def write_vision_gguf(checkpoint: Path, file: Path) -> None:
    """The vision tower and projector, as llama.cpp's projector qwen2.5vl_merger."""
    gguf: Any = importlib.import_module("gguf")
    image, weights = read(checkpoint / "preprocessor_config.json"), load(checkpoint)
    tower, writer = read(checkpoint / "config.json")["vision_config"], gguf.GGUFWriter(str(file), "clip")
    writer.add_string("clip.projector_type", "qwen2.5vl_merger")
    for flag in ("has_vision_encoder", "use_silu"):
        writer.add_bool(f"clip.{flag}", True)
    add_numbers(
        writer,
        "clip.vision.",
        image_size=20 * tower["patch_size"] * tower["spatial_merge_size"],
        patch_size=tower["patch_size"],
        embedding_length=tower["hidden_size"],
        feed_forward_length=tower["intermediate_size"],
        block_count=tower["depth"],
        window_size=tower["window_size"],
        n_wa_pattern=tower["fullatt_block_indexes"][0] + 1,
        spatial_merge_size=tower["spatial_merge_size"],
        projection_dim=tower["out_hidden_size"],
        attention__head_count=tower["num_heads"],
        attention__layer_norm_epsilon=1e-6,
        image_min_pixels=image["size"]["shortest_edge"],
        image_max_pixels=image["size"]["longest_edge"],
    )
    for name in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{name}", image[name])
    moments = weights["visual.patch_embed.proj.weight"]
    for time, name in enumerate(("weight", "weight.1")):
        writer.add_tensor(f"v.patch_embd.{name}", np.ascontiguousarray(moments[:, :, time]))
    for name in [name for name in weights if ".attn.qkv." in name]:
        for part, values in zip("qkv", np.split(weights.pop(name), 3), strict=True):
            weights[name.replace("qkv", part)] = values
    add_layers(writer, weights, "visual.blocks.", "v.blk.", TOWER)
    writer.add_tensor("v.post_ln.weight", weights["visual.merger.ln_q.weight"])
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        writer.add_tensor(f"mm.{name}", weights[f"visual.merger.mlp.{name}"])
    save(writer)


def add_numbers(writer: Any, prefix: str, **numbers: int | float) -> None:
    """By their names, in which two underscores are a dot."""
    for name, number in numbers.items():
        add = writer.add_float32 if isinstance(number, float) else writer.add_uint32
        add(prefix + name.replace("__", "."), number)


def add_layers(writer: Any, weights: dict[str, np.ndarray], prefix: str, into: str, names: dict[str, str]) -> None:
    """Those of every layer under `prefix`, by llama.cpp's names."""
    for name, values in weights.items():
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            part, kind = rest.rsplit(".", 1)
            writer.add_tensor(f"{into}{layer}.{names[part]}.{kind}", values)


def save(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def genai_answer(checkpoint: Path, folder: Path) -> Answer:
    importlib.import_module("onnxruntime_genai")
    raise RuntimeError("its model builder makes the text model of a Qwen2.5-VL alone: no vision tower, no image")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def load(checkpoint: Path) -> dict[str, np.ndarray]:
    """All weights, in float32."""
    numpy: Any = importlib.import_module("safetensors.numpy")
    return {name: values.astype(np.float32) for name, values in numpy.load_file(checkpoint / "model.safetensors").items()}


RUNTIMES = {"mistralrs": mistralrs_answer, "xllamacpp": xllamacpp_answer, "onnxruntime-genai": genai_answer}


def main(runtime: str, checkpoint: Path, folder: Path) -> None:
    lines, sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8"), sys.stderr  # the runtime's own words go elsewhere
    os.dup2(2, 1)
    answer = RUNTIMES[runtime](checkpoint, folder)
    print(json.dumps({"version": importlib.metadata.version(runtime)}), file=lines, flush=True)
    for line in sys.stdin:
        text, tokens = answer(json.loads(line))
        print(json.dumps({"text": text, "tokens": tokens}), file=lines, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
