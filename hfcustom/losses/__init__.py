"""Losses: the contract (contract.py), how it is evaluated (total.py, chunked.py), and those that come along.

A loss of your own needs none of these files: decorate it with `hfcustom.token_loss` or `hfcustom.term`. One that is to
come along goes into the file of its kind, and is found by the tests.
"""

from hfcustom.losses import alignment, auxiliary, distillation, experts, image_text, numeric  # register their losses
from hfcustom.losses.checks import check_labels
from hfcustom.losses.chunked import Head, token_log_probs, token_loss_total
from hfcustom.losses.config import (
    WeightedLoss,
    find_loss,
    import_losses,
    known,
    loss_columns,
    parse_losses,
    token_columns,
)
from hfcustom.losses.context import LossContext, StepSummary, Supervised, mean_rows
from hfcustom.losses.contract import (
    COUNTS,
    IGNORE,
    LOSSES,
    Loss,
    NonFiniteError,
    count_all_tokens,
    count_pairs,
    count_rows,
    count_tokens,
    is_packed,
    real_tokens,
    row_ids,
    row_starts,
    term,
    token_loss,
)
from hfcustom.losses.frozen import adapters_off, check_companion, frozen_context, frozen_pass
from hfcustom.losses.inputs import INPUTS, Teacher
from hfcustom.losses.preference import dpo, ipo, kto, orpo, simpo
from hfcustom.losses.token_losses import cross_entropy
from hfcustom.losses.total import (
    Divisors,
    LossValue,
    check_whole_step,
    evaluate,
    refuse_preference,
    spread_items,
    summarise,
)

STOCK = Loss("stock", cross_entropy)  # the parent's own path, for its name and its count only
