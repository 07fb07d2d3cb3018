"""The numbers of `rows` as compile-time constants: Triton reads no other globals."""

import triton.language as tl

from dycoke_core.gpu_kernels import rows

PAGE = tl.constexpr(rows.PAGE)

ROW_COLUMNS = tl.constexpr(rows.ROW_COLUMNS)
SEAT = tl.constexpr(rows.SEAT)
TOKEN_ID = tl.constexpr(rows.TOKEN_ID)
FIRST_PRUNED = tl.constexpr(rows.FIRST_PRUNED)
SCORING_LAYER = tl.constexpr(rows.SCORING_LAYER)
NUM_VISUAL = tl.constexpr(rows.NUM_VISUAL)
NUM_KEPT = tl.constexpr(rows.NUM_KEPT)
VISUAL_FIRST = tl.constexpr(rows.VISUAL_FIRST)
KEPT_FIRST = tl.constexpr(rows.KEPT_FIRST)
THRESHOLD = tl.constexpr(rows.THRESHOLD)
CHOICE = tl.constexpr(rows.CHOICE)
FLAGS = tl.constexpr(rows.FLAGS)
GIVEN_FIRST = tl.constexpr(rows.GIVEN_FIRST)
HOST_FIRST = tl.constexpr(rows.HOST_FIRST)

NO_LAYER = tl.constexpr(rows.NO_LAYER)
LOWEST = tl.constexpr(rows.LOWEST)
GIVEN = tl.constexpr(rows.GIVEN)
FIRST_STEP = tl.constexpr(rows.FIRST_STEP)
ONE_SHOT = tl.constexpr(rows.ONE_SHOT)
KEPT_IN_OWN_ROWS = tl.constexpr(rows.KEPT_IN_OWN_ROWS)

ITEM_COLUMNS = tl.constexpr(rows.ITEM_COLUMNS)
FIRST_ROW = tl.constexpr(rows.FIRST_ROW)
NUM_ROWS = tl.constexpr(rows.NUM_ROWS)
FIRST_SLOT = tl.constexpr(rows.FIRST_SLOT)
NUM_SLOTS = tl.constexpr(rows.NUM_SLOTS)
FIRST_LAYER = tl.constexpr(rows.FIRST_LAYER)
END_LAYER = tl.constexpr(rows.END_LAYER)
CAUSAL = tl.constexpr(rows.CAUSAL)
