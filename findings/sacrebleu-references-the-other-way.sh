#!/usr/bin/env bash
# Expected: references handed over as one list for each sentence, as NLTK, torchmetrics and evaluate want them, are either understood or
#   refused by sacrebleu, which wants one list for each SET of references, as long as the hypotheses.
# Happens (sacrebleu 2.6.0): accepted. Only as many sentences are scored as the inner lists are long, the first ones, against every
#   sentence's reference at once; the rest is not looked at. Where each sentence has one reference the score is that of the first
#   sentence: 100.00 here, where the corpus deserves 44.02. corpus_chrf and corpus_ter do the same. Nothing is printed.
#   Only `ref_len` and `hyp_len` of the result tell.
# Hurts: whoever moves an evaluation from one package to another. With several references a sentence the number is plausible (69.87 for
#   55.86 here).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet sacrebleu==2.6.0 nltk==3.10.4
"$folder/venv/bin/python" - <<'P'
import sacrebleu
from nltk.translate.bleu_score import corpus_bleu as nltk_bleu

hypotheses = ["春天来了，花都开了。", "他在学校里读书。", "这家店的菜很好吃。", "我们明天去北京。"]
references = ["春天来了，花都开了。", "他在图书馆看报纸。", "那家餐馆的菜不错。", "我们明天去上海旅游。"]
a_list_each = [[reference] for reference in references]

print("sacrebleu", sacrebleu.__version__)
right = sacrebleu.corpus_bleu(hypotheses, [references], tokenize="zh")
wrong = sacrebleu.corpus_bleu(hypotheses, a_list_each, tokenize="zh")
by_nltk = 100 * nltk_bleu([[list(r) for r in refs] for refs in a_list_each], [list(h) for h in hypotheses])
print(f"[references]:    {right}")
print(f"a list each:     {wrong}")
print(f"NLTK, list each: {by_nltk:.2f}")
chrf = [sacrebleu.corpus_chrf(hypotheses, refs).score for refs in ([references], a_list_each)]
ter = [sacrebleu.corpus_ter(hypotheses, refs, normalized=True, asian_support=True).score for refs in ([references], a_list_each)]
print("chrF:", [round(x, 2) for x in chrf], "TER:", [round(x, 2) for x in ter])

# Two references each: plausible numbers.
two = [[reference, hypothesis[:4] + reference[4:]] for reference, hypothesis in zip(references, hypotheses)]
sets = [list(refs) for refs in zip(*two)]
of_two = [round(sacrebleu.corpus_bleu(hypotheses, refs, tokenize="zh").score, 2) for refs in (sets, two)]
print("two references each, as sets and the other way:", of_two)
total = len("".join(hypotheses))
assert right.sys_len == total and abs(right.score - by_nltk) < 0.01, "it changed"
assert round(wrong.score, 2) == 100.0 and wrong.sys_len == len(hypotheses[0]), "it changed"
assert round(chrf[1], 2) == 100.0 and ter[1] == 0 and chrf[0] < 50 and ter[0] > 30, "it changed"
assert of_two == [55.86, 69.87], "it changed"
P
