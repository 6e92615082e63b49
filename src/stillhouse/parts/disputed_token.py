"""Where a student's own text and its teacher part most, and the text up to there put right.

Text sampled from a student covers the prefixes it will meet, but behind an error the teacher's
distribution is noise. So the one position is found at which both disagree most, the teacher's
token is put there, and the student goes on from it; everything before stays as it was.

Source: sequence correction of Multi-Granularity Semantic Revision (arXiv 2407.10068, equation 3);
the direction of the divergence is reconstructed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.losses.logits import kl


class Disputed(NamedTuple):
    """The most disputed token of each row.

    Attributes:
        position: (B,) int64, its place j; -1 where the teacher agrees everywhere.
        teacher_token: (B, L) int64, what the teacher would say at each place.
        candidates: (B, L) bool, places of the text at which it would say something else.
        divergence: (B, L) KL(teacher || student) per token, 0 outside of the mask.
    """

    position: Tensor
    teacher_token: Tensor
    candidates: Tensor
    divergence: Tensor


class Prefix(NamedTuple):
    """A text up to and with its corrected token.

    Attributes:
        tokens: (B, L) int64: the kept tokens, the teacher's, then -1; a row without a dispute
            is the whole text.
        length: (B,) int64, number of tokens kept, the teacher's included.
        stops: (B,) bool, nothing follows: the teacher's token ends the text, or there was no
            dispute.
    """

    tokens: Tensor
    length: Tensor
    stops: Tensor


def disputed_token(
    student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor
) -> Disputed:
    """Find the token of the student's text that student and teacher disagree about most.

    Only places at which the teacher's likeliest token is another one are looked at, of them the
    one with the largest divergence; prompt and padding never are.

    Args:
        student_logits: (B, L, V), those at place i predict token i.
        teacher_logits: (B, L, V), likewise, under the student's own prefix.
        tokens: (B, L) int64, the student's text.
        mask: (B, L) true on tokens of the response, its end included.

    Raises:
        ModelError: shapes that do not fit.
    """
    if not teacher_logits.shape[:-1] == tokens.shape == mask.shape:
        raise ModelError(
            f"logits {tuple(teacher_logits.shape)}, tokens {tuple(tokens.shape)} and mask "
            f"{tuple(mask.shape)} must have one row per text and one column per token"
        )
    with torch.no_grad():
        divergence = kl(student_logits, teacher_logits, mask=mask.bool(), reduction="none")
    return most_disputed(divergence, teacher_logits.argmax(-1), tokens, mask)


def most_disputed(
    divergence: Tensor, teacher_token: Tensor, tokens: Tensor, mask: Tensor
) -> Disputed:
    """As `disputed_token`, from what is known of each place already.

    Args:
        divergence: (B, L), looked at inside of the mask only.
        teacher_token: (B, L) int64, the teacher's likeliest token.
        tokens: (B, L) int64.
        mask: (B, L).
    """
    valid = mask.bool()
    candidates = valid & (teacher_token != tokens)
    scored = divergence.masked_fill(~candidates, -torch.inf)
    position = scored.argmax(-1).masked_fill(~candidates.any(-1), -1)
    return Disputed(position, teacher_token, candidates, divergence)


def corrected_prefix(tokens: Tensor, mask: Tensor, found: Disputed, end: int | None) -> Prefix:
    """The text before the disputed token, and the teacher's token in its place.

    Args:
        tokens: (B, L) int64, as given to `disputed_token`.
        mask: (B, L), likewise.
        found: what it gave.
        end: the token that ends a text; None when there is none.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    at = found.position.unsqueeze(-1)
    agreed = at < 0
    whole = torch.where(agreed, tokens, tokens.masked_fill(places > at, -1))
    corrected = torch.where(places == at, found.teacher_token, whole)
    last = torch.where(mask.bool(), places, -1).amax(-1)
    length = torch.where(agreed.squeeze(-1), last, found.position) + 1
    ended = found.teacher_token.gather(-1, at.clamp_min(0)).squeeze(-1)
    stops = agreed.squeeze(-1)
    if end is not None:
        stops = stops | (ended == end)
    return Prefix(corrected, length, stops)
