"""Prompt lookup: drafts of what comes next, copied from what the text already says.

A step of the decoder over several positions costs little more than over one. So what followed the
last few tokens where they stood before is fed along with the last token, and the step tells how
much of it is what would have been written anyway: `Writer` keeps that and no more.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; the steps of Leviathan et al.
2022, arXiv:2211.17192, without a second model.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH = 2  # tokens: looked for first; then one
# Tokens of the first draft, and of those after a failure. After one that was right throughout, the
# next is twice as long.
FIRST_LENGTH, SHORTEST_LENGTH = 4, 2
LONGEST_REST = 16  # steps without a draft, after several that came to nothing


def find_draft(text: str, most: int) -> str:
    """What followed the latest earlier place where ``text`` ended like now; "" if there is none.

    The longest match decides, `LONGEST_MATCH` tokens or fewer. A place so near that it runs into
    the end is continued by what it would copy: "abcab" goes on "cabcab…".

    Args:
        text: a character a token. Strings, since searching them is quick.
        most: tokens of the draft.
    """
    for length in range(min(LONGEST_MATCH, len(text) - 1), 0, -1):
        at = text.rfind(text[-length:], 0, -1)
        if at >= 0:
            followed = text[at + length :]
            return (followed * (most // len(followed) + 1))[:most]
    return ""


class PromptLookup:
    """Drafts for one text, as long as they have been worth lately.

    Args:
        prompt: token ids.
        most: tokens of a draft at most; kept.
    """

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        self._text = "".join(map(chr, prompt))
        self.most = most
        self._length = min(FIRST_LENGTH, most)  # of the next draft
        self._drafted = 0  # tokens of the last one
        self._failures = 0  # drafts in a row of which nothing was right
        self._rest = 0  # steps until the next draft

    def append(self, token_id: int) -> None:
        """The text goes on."""
        self._text += chr(token_id)

    def draft(self, room: int) -> list[int]:
        """Token ids that may come next, no more than ``room``; often none."""
        found = ""
        if self._rest:
            self._rest -= 1
        elif room:
            found = find_draft(self._text, min(self._length, room))
        self._drafted = len(found)
        return list(map(ord, found))

    def judge(self, right: int) -> None:
        """So many of the last draft's tokens were right, counted from its first."""
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
    """The least that is not below ``number``, from 1 on: so lengths of drafts are few."""
    return 1 << (number - 1).bit_length()
