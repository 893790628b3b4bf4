"""启动服务，用 openai 的客户端调用，再关掉。

    python examples/serve_client.py
    python examples/serve_client.py --model plug-27b --port 8001

需要 pip install ".[serve]" openai；不用显卡，不用网络。
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="启动服务，用 openai 的客户端调用。")
    parser.add_argument("--model", default="plug-mini-zh", help="模型目录")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()

    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # 设了代理时，本机不走代理
    command = [sys.executable, "-m", "plug", "serve", "--model", options.model]
    server = subprocess.Popen([*command, "--port", str(options.port)])
    try:
        address = f"http://127.0.0.1:{options.port}"
        wait_for(server, address)
        call(address)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def wait_for(server: subprocess.Popen[bytes], address: str) -> None:
    """等到服务可以接受请求。"""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/ready").close()
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise SystemExit("服务没有启动，原因见上。")


def call(address: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="any")
    name = client.models.list().data[0].id

    answer = client.completions.create(model=name, prompt="春天来了，", max_tokens=30, seed=1)
    print("一次给出：", answer.choices[0].text)

    print("流式输出：", end="")
    for chunk in client.completions.create(
        model=name,
        prompt="山上有座庙，",
        max_tokens=30,
        seed=1,
        stream=True,
        extra_body={"top_k": 40, "no_repeat_ngram_size": 4},  # PLUG 自己的选项
    ):
        print(chunk.choices[0].text, end="", flush=True)
    print()

    vectors = client.embeddings.create(
        model=name, input=["春天来了", "花开了"], encoding_format="float"
    )
    print("向量：", len(vectors.data), "个，各", len(vectors.data[0].embedding), "维")


if __name__ == "__main__":
    main()
