#!/usr/bin/env bash
# Expected: after jieba.enable_parallel(n), which the README offers as a speed-up, cutting gives the same words as before, and
#   jieba.add_word, del_word, suggest_freq and load_userdict are heeded by the next cut, as they are without it.
# Happens (jieba 0.42.1): the processes are forked by enable_parallel with the dictionary of that moment, and never hear of a later one.
#   jieba.cut and cut_for_search, the only two functions that are parallel, go on with the old words; lcut, lcut_for_search and
#   extract_tags run in the main process and have the new ones. One text has two segmentations in one program, nothing is printed, and
#   lcut is not faster either. enable_parallel after the last change of the dictionary, or again, is what works.
# Hurts: whoever cuts a corpus with jieba.cut and a user dictionary that is loaded or mended after the switch: names and terms are in pieces in
#   the corpus, in whatever is trained on it, while a query cut with lcut has them whole and finds nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jieba==0.42.1
cd "$folder"
printf '石墨烯毡 1000 n\n' >words.txt
"$folder/venv/bin/python" -W ignore - <<'P'
import jieba
import jieba.analyse

jieba.setLogLevel("ERROR")
text = "石墨烯毡是新材料"
jieba.initialize()


def words():
    return {"cut": list(jieba.cut(text)), "cut_for_search": list(jieba.cut_for_search(text)), "lcut": jieba.lcut(text)}


print("jieba", jieba.__version__)
jieba.enable_parallel(2)
jieba.load_userdict("words.txt")
stale = words()
tags = jieba.analyse.extract_tags(text)
jieba.disable_parallel()
alone = words()
jieba.enable_parallel(2)
again = words()
jieba.disable_parallel()
for name, found in (("enabled, then load_userdict", stale), ("not parallel", alone), ("enabled again", again)):
    print(f"{name}:", {function: "/".join(cut) for function, cut in found.items()})
print("extract_tags while enabled:", tags)
assert "石墨烯毡" not in stale["cut"] and "石墨烯毡" not in stale["cut_for_search"], "it changed"
assert "石墨烯毡" in stale["lcut"] and "石墨烯毡" in tags, "it changed"
assert all("石墨烯毡" in cut for found in (alone, again) for cut in found.values()), "it changed"
P
