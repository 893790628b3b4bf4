"""How much a model repeats itself: share of repeated 4-grams in continuations of 200 characters.

    python experiments/continuations.py [--model M] [--show]

Four kinds of prompts, two of each, four seeds; temperature 0.9, top-k 20, once without and once
with the default repetition penalty. `--show` also prints the texts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json

import plug

PROMPTS = {
    "novel": [
        "却说那日天色将晚，只见山门外走进一个老和尚来，手里拿着一根禅杖，对众人道：",
        "林家铺子的老板坐在柜台后面，望着街上稀稀落落的行人，心里想着",
    ],
    "encyclopedia": ["长江是中国第一大河，发源于", "北京大学是中国的一所综合性大学，创办于"],
    "news": [
        "国务院总理今天主持召开国务院常务会议，研究部署",
        "新华社北京消息，中国国家统计局今天公布",
    ],
    "question": [
        "问：最近总是失眠，晚上睡不着，白天没有精神，应该怎么办？\n答：",
        "问：胃痛、反酸，吃饭以后更厉害，是什么原因？\n答：",
    ],
}
SEEDS = [1, 2, 3, 4]
CHARACTERS = 200


def repeated_share(text: str, n: int = 4) -> float:
    """Share of n-grams of characters that stood in the text before."""
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(set(grams)) / max(1, len(grams))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="plug-mini-zh")
    parser.add_argument("--show", action="store_true")
    arguments = parser.parse_args()
    generator = plug.Generator(arguments.model)
    results: dict[str, dict[str, float]] = {}
    for name, penalty in (("without_penalty", 1.0), ("default", None)):
        shares = {}
        for kind, prompts in PROMPTS.items():
            texts = [prompt for prompt in prompts for _ in SEEDS]
            written = plug.generate(
                texts,
                model=generator,
                out_length=220,
                seed=SEEDS * len(prompts),
                repetition_penalty=penalty,
            )
            cut = [one.text[:CHARACTERS] for one in written]
            shares[kind] = round(sum(map(repeated_share, cut)) / len(cut), 4)
            if arguments.show:
                for prompt, text in zip(texts, cut, strict=True):
                    print(f"[{name}, {kind}] {prompt}\n  ▸ {text}\n")
        results[name] = {**shares, "mean": round(sum(shares.values()) / len(shares), 4)}
    print(json.dumps({"model": arguments.model, "repeated_4grams": results}, ensure_ascii=False))


if __name__ == "__main__":
    main()
