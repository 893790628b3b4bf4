"""`python -m plug.integrations.modelscope FILE …` runs a program that was written for ModelScope.

The file stays as it is; with `torchrun -m` or `deepspeed --module` in place of `python -m` too.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from plug.errors import PlugError


def main(arguments: list[str]) -> int:
    """Run the file named first, which sees the other arguments as its own."""
    files = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if not files:
        print("用法：python -m plug.integrations.modelscope 程序.py [参数 …]", file=sys.stderr)
        return 2
    path = Path(files[0])
    if not path.is_file():
        print(f"错误：找不到程序 {path}。", file=sys.stderr)
        return 2
    # As `python FILE` sets them; what a launcher put before the file goes after it.
    rest = [argument for argument in arguments if argument != files[0]]
    sys.argv = [str(path), *rest]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except PlugError as error:
        print(f"错误：{error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
