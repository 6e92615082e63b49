"""E6, the chunked loss of TRL's stable distillation trainer."""

from e6_case import Case
from trl.trainer.distillation_trainer import _chunked_divergence_loss

case = Case()


def loss():
    """As its trainer calls it."""
    return _chunked_divergence_loss(
        case.student[None],
        case.teacher[None],
        case.student_weight,
        case.teacher_weight,
        case.mask[None].long(),
        case.beta,
    )[0]


case.measure(loss)
