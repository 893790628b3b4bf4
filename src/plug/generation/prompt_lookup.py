"""`PromptLookup`: drafts of the next tokens, copied from an earlier place in prompt and text.

A step of the decoder over several positions costs little more than over one. So the tokens that
followed the text's last tokens at an earlier place are fed together with the last token. The step
shows how many of them would have been written anyway; `Scheduler` keeps those and no more.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; the steps of Leviathan et al.
2022, arXiv:2211.17192, without a second model.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH = 2  # tokens; a match of this length is looked for first, then one of 1
# Tokens of the first draft, and of a draft after one that was wrong from the start. After a draft
# that was right to its end, the next is twice as long.
FIRST_LENGTH, SHORTEST_LENGTH = 4, 2
LONGEST_REST = 16  # steps without a draft, after several drafts that were wrong from the start


def find_draft(text: str, most: int) -> str:
    """Return what followed the latest earlier place that matches the end of ``text``, or "".

    The longest match decides, of `LONGEST_MATCH` tokens or fewer. If the copied text reaches the
    end, it goes on with the copy itself: after "abcab" the draft is "cabcab…".

    Args:
        text: one character for each token; searching a string is fast.
        most: tokens of the draft.
    """
    for length in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        at = text.rfind(text[-length:], 0, -1)
        if at >= 0:
            followed = text[at + length :]
            return (followed * (most // len(followed) + 1))[:most]
    return ""


class PromptLookup:
    """Drafts for one text; their length follows how many of their tokens were right lately.

    Args:
        prompt: token ids.
        most: tokens of a draft, at most; an attribute too.
    """

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        self._text = "".join(map(chr, prompt))
        self.most = most
        self._length = min(FIRST_LENGTH, most)  # of the next draft
        self._drafted = 0  # tokens of the last draft
        self._failures = 0  # drafts in a row whose first token was wrong
        self._rest = 0  # steps until the next draft

    def append(self, token_id: int) -> None:
        """Add a token that was written."""
        self._text += chr(token_id)

    def draft(self, room: int) -> list[int]:
        """Return ids that may come next, no more than ``room``; often none."""
        found = ""
        if self._rest:
            self._rest -= 1
        elif room:
            found = find_draft(self._text, min(self._length, room))
        self._drafted = len(found)
        return list(map(ord, found))

    def judge(self, right: int) -> None:
        """Note how many of the last draft's tokens were right, counted from its first."""
        if not self._drafted:
            return
        if right == self._drafted:
            self._length = min(2 * self._length, self.most)
        else:
            self._length = min(power_of_two(max(right, SHORTEST_LENGTH)), self.most)
        self._failures = 0 if right else self._failures + 1
        if self._failures > 1:
            self._rest = min(2 ** (self._failures - 2), LONGEST_REST)


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below ``number``; few lengths need few graphs."""
    return 1 << (number - 1).bit_length()
