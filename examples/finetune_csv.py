"""用自己的 CSV 训练一个分类器，看报告，再预测。

    python examples/finetune_csv.py
    python examples/finetune_csv.py --train 我的训练.csv --eval 我的评测.csv --output runs/mine

CSV 的第一行是列名 text,label。需要 pip install ".[train]"；不用显卡，一分钟左右。
"""

from __future__ import annotations

import argparse
from pathlib import Path

import plug

FOLDER = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="用自己的 CSV 训练一个分类器。")
    parser.add_argument("--train", default=str(FOLDER / "news-train.csv"), help="训练的 CSV")
    parser.add_argument("--eval", default=str(FOLDER / "news-dev.csv"), help="评测的 CSV")
    parser.add_argument("--output", default="runs/news-example", help="新的输出目录")
    parser.add_argument("--model", default="plug-mini-zh", help="从哪个模型开始")
    parser.add_argument("--epochs", type=float, default=3, help="训练几轮")
    options = parser.parse_args()

    settings = plug.FinetuneSettings(task="classification", **vars(options))
    result = plug.finetune(settings)
    accuracy, low, high = (
        result.metrics[name] for name in ("accuracy", "accuracy_low", "accuracy_high")
    )
    print(f"准确率 {accuracy:.3f}，95% 置信区间 {low:.3f} 到 {high:.3f}")
    print(f"报告：{result.directory}/report.html")

    predictor = plug.Predictor(options.output)
    for text in ("球队补时绝杀，主场三比二取胜", "两市成交额突破一万亿元", "鸡汤里放几颗红枣"):
        print(text, "→", predictor.predict_text(text))


if __name__ == "__main__":
    main()
