"""`configuration.json`: what ModelScope reads of a directory before anything else.

It names the task and the pipeline (`plug.integrations.modelscope` has them), and under "model" the
options that the pipeline writes with unless it is told others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plug.files import write_json
from plug.model.configuration import PlugConfig

CONFIGURATION_FILE = "configuration.json"
GENERATION = ("text-generation", "plug-generation")
# The released model's own options (its `configuration.json`), which `plug generate` has too.
SAMPLING = {"top_p": 0.0, "temperature": 0.9, "top_k": 20}
PIPELINES = {  # kind of fine-tuning -> ModelScope's task, and the name of our pipeline for it
    "generation": GENERATION,
    "classification": ("text-classification", "plug-text-classification"),
    "labelling": ("token-classification", "plug-token-classification"),
}


def configuration(task: str, pipeline: str, options: dict[str, Any]) -> dict[str, Any]:
    """The content of the file; ``options`` are those of the pipeline's calls."""
    return {
        "framework": "pytorch",
        "task": task,
        "model": {"type": "plug", **options},
        "pipeline": {"type": pipeline},
    }


def write_pretrained_configuration(directory: Path, config: PlugConfig) -> None:
    """Write the file of a model that was not fine-tuned.

    Args:
        directory: of the model.
        config: of the model; without a decoder it can fill masks alone.
    """
    if not config.num_decoder_layers:
        content = configuration("fill-mask", GENERATION[1], {})
    else:
        # Two passes mark a model imported from the original, whose rules it then writes by.
        mode = "original" if config.encoder_final_norm_passes == 2 else "plug"
        content = configuration(*GENERATION, {"mode": mode, **SAMPLING})
    write_json(directory / CONFIGURATION_FILE, content)


def write_finetuned_configuration(directory: Path, kind: str, num_beams: int) -> None:
    """The file of a fine-tuned model; none where ModelScope has no task for the ``kind``.

    A fine-tuned generator writes as it was evaluated: argmax or beams, and [SEP] in its source
    separates parts.
    """
    if kind not in PIPELINES:
        return
    options: dict[str, Any] = {}
    if kind == "generation":
        options = {"do_sample": False, "num_beams": num_beams, "allow_special_tokens": True}
    write_json(directory / CONFIGURATION_FILE, configuration(*PIPELINES[kind], options))
