"""Who takes part, what each is made from, and how: data."""

from __future__ import annotations

from dataclasses import dataclass

from peers.load import CONTEXT
from peers.make import Artefact

#: our packages, on whose code our artefacts depend
COMPILER = ("graphs", "calibration", "quant", "runtimes", "export")

RECIPE = "peers/quick.toml"

#: target -> the distribution that lowers for it
LIBRARIES = {
    "onnxruntime": "onnxruntime",
    "executorch": "executorch",
    "coreml": "coremltools",
    "tensorrt": "tensorrt-rtx-cu13",
}


def ours(target: str) -> Artefact:
    """A bundle as a user would export it."""
    what = ("mobilevlm", "--checkpoint", "{checkpoint}", "--target", target, "--quant", RECIPE)
    options = ("--compress", "last_logits", "--max-context", str(CONTEXT), "--out", "{OUT}/bundle")
    packages = ("torch", LIBRARIES[target])
    return Artefact(("export.cli", "export", *what, *options), ("checkpoint",), (*COMPILER, RECIPE), packages)


def gguf(kind: str) -> Artefact:
    """One of the two files of llama.cpp."""
    sources = ("peers/llama_cpp/names.py", "peers/checkpoint.py")
    arguments = ("peers.llama_cpp.convert", "{OUT}", "{checkpoint}", kind)
    return Artefact(arguments, ("checkpoint",), sources, ("llama-cpp-python", "gguf"))


#: options of ExecuTorch's `export_llm`, as its documentation has them for XNNPACK
EXECUTORCH_OPTIONS = (
    "base.model_class=llama2",
    "base.checkpoint={executorch-checkpoint}/checkpoint.pth",
    "base.params={executorch-checkpoint}/params.json",
    "model.use_kv_cache=true",
    "model.use_sdpa_with_kv_cache=true",
    "backend.xnnpack.enabled=true",
    "backend.xnnpack.extended_ops=true",
    "quantization.qmode=8da4w",
    "quantization.group_size=32",
    "quantization.embedding_quantize='8,0'",
    f"export.max_seq_length={CONTEXT}",
    f"export.max_context_length={CONTEXT}",
    "export.output_dir={OUT}",
    "export.output_name=model",
    "hydra.run.dir={OUT}/log",
)

ARTEFACTS: dict[str, Artefact] = {
    "checkpoint": Artefact(
        ("zoo.random_checkpoint", "mobilevlm", "--variant", "mobilevlm-1.7b", "--out", "{OUT}"),
        sources=("graphs/weights.py",),
    ),
    "reference": Artefact(
        ("peers.ours.reference", "{OUT}", "{checkpoint}"),
        ("checkpoint",),
        ("graphs/components", "graphs/architectures/mobilevlm.py", "peers/ours/eager.py", "peers/load.py"),
    ),
    **{f"ours-{target}": ours(target) for target in LIBRARIES},
    "gguf-text": gguf("text"),
    "gguf-vision-q8_0": gguf("q8_0"),
    "gguf-vision-f16": gguf("f16"),
    "text-checkpoint": Artefact(
        ("peers.text_checkpoint", "{OUT}", "{checkpoint}"), ("checkpoint",), ("peers/checkpoint.py",)
    ),
    "genai": Artefact(
        (
            *("onnxruntime_genai.models.builder", "-i", "{text-checkpoint}", "-o", "{OUT}", "-c", "{OUT}/cache"),
            *("-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"),
        ),
        ("text-checkpoint",),
        packages=("onnxruntime-genai", "transformers"),
    ),
    "executorch-checkpoint": Artefact(
        ("peers.executorch.checkpoint", "{OUT}", "{checkpoint}"), ("checkpoint",), ("peers/checkpoint.py",)
    ),
    "executorch": Artefact(
        ("executorch.extension.llm.export.export_llm", *EXECUTORCH_OPTIONS),
        ("executorch-checkpoint",),
        packages=("executorch", "torchao"),
    ),
    "vision-fp32": Artefact(
        ("peers.ours.vision_onnx", "{OUT}", "{checkpoint}"),
        ("checkpoint",),
        ("graphs/components", "peers/ours/eager.py"),
        ("torch", "onnxscript"),
    ),
    "vision-int8": Artefact(
        ("peers.onnxruntime.quantize", "{OUT}", "{vision-fp32}"), ("vision-fp32",), packages=("onnxruntime",)
    ),
}


@dataclass(frozen=True)
class Contender:
    """A row: what runs it, with which artefacts, and what those are. Without a worker they are made alone."""

    name: str
    worker: str | None
    artefacts: tuple[str, ...]
    about: str
    ours: bool = False


CONTENDERS = (
    Contender(
        "vlmx onnxruntime",
        "peers.ours.worker",
        ("ours-onnxruntime",),
        f"decoder int4 in groups of 32, head and tower int8 ({RECIPE})",
        ours=True,
    ),
    Contender(
        "vlmx executorch",
        "peers.ours.worker",
        ("ours-executorch",),
        f"decoder int4 in groups of 32, head and tower int8 ({RECIPE})",
        ours=True,
    ),
    Contender(
        "vlmx coreml",
        None,
        ("ours-coreml",),
        f"decoder int4 in groups of 32, head and tower int8 ({RECIPE}); made alone: Core ML runs on Apple's systems",
        ours=True,
    ),
    Contender(
        "vlmx tensorrt",
        None,
        ("ours-tensorrt",),
        f"decoder int4 in groups of 32, head and tower int8 ({RECIPE}); made alone: `make bench-gpu` runs engines",
        ours=True,
    ),
    Contender(
        "llama.cpp",
        "peers.llama_cpp.worker",
        ("gguf-text", "gguf-vision-q8_0"),
        "text Q4_0, tower and projector Q8_0",
    ),
    Contender(
        "llama.cpp, f16 tower",
        "peers.llama_cpp.tower",
        ("gguf-text", "gguf-vision-f16"),
        "tower and projector float16, as its converter leaves them",
    ),
    Contender(
        "onnxruntime-genai", "peers.genai.worker", ("genai",), "int4 in blocks of 32, accuracy level 4; decoder only"
    ),
    Contender(
        "ExecuTorch's own flow",
        "peers.executorch.worker",
        ("executorch",),
        "8da4w in groups of 32, sdpa_with_kv_cache, 8-bit embedding; decoder only",
    ),
    Contender("ONNX Runtime fp32", "peers.onnxruntime.worker", ("vision-fp32",), "float32; tower only"),
    Contender(
        "ONNX Runtime static int8",
        "peers.onnxruntime.worker",
        ("vision-int8",),
        "its quantize_static: QDQ, weights per channel; tower only",
    ),
)
