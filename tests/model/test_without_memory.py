from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_what_only_needs_shapes_imports_no_compiler(model_directory: Path, tmp_path: Path) -> None:
    """That takes a second, and Triton says at the end of the process what it has lost."""
    program = f"""
import sys
from plug.checkpoints.original_layout import tensor_table
from plug.errors import PlugError
from plug.finetuning.plain import load_classifier
from plug.model.configuration import PRESETS
from plug.quantization.convert import quantize_directory
from pathlib import Path
tensor_table(PRESETS["test"])
quantize_directory({str(model_directory)!r}, Path({str(tmp_path / "target")!r}), bits=8)
try:
    load_classifier(Path({str(model_directory)!r}), 2)
except PlugError as error:
    print("classifier" in str(error), "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.stdout == "True False\n", done.stderr
