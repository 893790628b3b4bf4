#!/usr/bin/env bash
# Expected: dataset.map(cut) cuts anew after jieba.add_word or jieba.load_userdict, in this process or the next: the documentation says that
#   a map is taken from the cache as long as its function has not changed, and that the hash follows what the function refers to.
# Happens (datasets 5.2.0, jieba 0.42.1): the hash takes a module by its name. The dictionary is state inside the module, so that a cut with
#   another dictionary is the same function: the old words come from the cache, and nothing is printed. jieba.del_word, suggest_freq
#   and set_dictionary are missed alike. A dictionary's path or hash in fn_kwargs makes another function; load_from_cache_file=False
#   forgoes the cache.
# Hurts: whoever mends a user dictionary and cuts the corpus again: keywords, statistics and a model trained on "the new" words have the old
#   ones, also days later in another process. It looks as if the dictionary did not help.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 jieba==0.42.1 "setuptools<81"
cd "$folder"
cat >corpus.jsonl <<'J'
{"text": "云计算工程师李小福"}
{"text": "李小福是创新办主任"}
J
cat >run.py <<'P'
import sys

import datasets
import jieba

datasets.disable_progress_bars()
jieba.setLogLevel("ERROR")


def cut(example):
    return {"words": "/".join(jieba.lcut(example["text"]))}


def cut_with(example, dictionary):
    return {"words": "/".join(jieba.lcut(example["text"]))}


words = sys.argv[1:]
for word in words:
    jieba.add_word(word)
corpus = datasets.load_dataset("json", data_files="corpus.jsonl", split="train", cache_dir="cache")
mapped, named = corpus.map(cut)["words"][:], corpus.map(cut_with, fn_kwargs={"dictionary": words})["words"][:]
direct = [cut(example)["words"] for example in corpus]
print("words added:", words, "\n  map:             ", mapped, "\n  dictionary named:", named, "\n  jieba itself:    ", direct)
assert named == direct, "it changed"
assert (mapped == direct) == (not words), "it changed"
P
"$folder/venv/bin/python" -W ignore -c 'import datasets, jieba; print("datasets", datasets.__version__, "jieba", jieba.__version__)'
for words in "" "云计算 创新办"; do  # two processes, one cache
    HF_HOME="$folder/home" "$folder/venv/bin/python" -W ignore run.py $words
done
