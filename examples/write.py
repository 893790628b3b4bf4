"""续写：一段，几个版本，流式输出。

    python examples/write.py
    python examples/write.py "山上有座庙，" --model plug-27b

需要 pip install "."；不用显卡，不用下载模型。
"""

from __future__ import annotations

import argparse

import plug


def main() -> None:
    parser = argparse.ArgumentParser(description="续写一段文字。")
    parser.add_argument("text", nargs="?", default="春天来了，", help="开头")
    parser.add_argument("--model", default="plug-mini-zh", help="模型目录")
    options = parser.parse_args()

    generator = plug.Generator(options.model)  # 载入一次，多次使用

    print("一段：", generator(options.text, out_length=60, seed=1).text)

    versions = generator(options.text, out_length=30, seed=1, num_return_sequences=3)
    for version in versions:  # 种子各不相同；要哪一个，就用它的种子再写
        print(f"种子 {version.seed}：", version.text)

    print("流式输出：", end="")
    for piece in generator.stream(options.text, out_length=60, seed=7, top_p=0.9):
        print(piece.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
