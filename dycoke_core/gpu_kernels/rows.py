"""The integer tables that describe a step to the kernels, column by column.

The host fills them once per step. Triton is not imported here, so a plan can be made without it;
`columns` has the same numbers as compile-time constants.
"""

PAGE = 64  # slots per page; a slot's row of the pool in layer t is slot + t * PAGE

# ROWS int32 [B, ROW_COLUMNS], one row per token that runs in the step.
ROW_COLUMNS = 16
SEAT = 0  # row of the tables that outlive a step; 0 is the null seat of padding rows
TOKEN_ID = 1  # LAST_TOKEN: the id sampled for this seat in the step before
WRITE_SLOT = 2  # where this token's key and value go
FIRST_PRUNED = 3  # L: from this layer on, only the seat's own list is read
SCORING_LAYER = 4  # NO_LAYER: selects nothing in this step
NUM_VISUAL = 5  # V
NUM_KEPT = 6
VISUAL_FIRST = 7  # offset in SLOTS of the V visual tokens
KEPT_FIRST = 8  # offset in SLOTS of the seat's list, which starts with the kept tokens
THRESHOLD = 9  # of the gate: the bits of a float32
CHOICE = 10
FLAGS = 11
GIVEN_FIRST = 12  # offset in GIVEN of the kept places, if CHOICE is GIVEN
HOST_FIRST = 13  # offset in the host's slots of the V visual tokens, with KEPT_IN_OWN_ROWS

LAST_TOKEN = -1
NO_LAYER = -1

# CHOICE
HIGHEST, LOWEST, GIVEN = 0, 1, 2

# FLAGS, bits
FIRST_STEP = 1  # the sequence's first decode step: selects regardless of the gate
ONE_SHOT = 2  # never selects again
KEPT_IN_OWN_ROWS = 4  # the kept tokens are copied into rows of their own: SLOTS does not change

# ITEMS int32 [cap, ITEM_COLUMNS], one row per work item of `split_attend`.
ITEM_COLUMNS = 8
FIRST_ROW = 0  # of the batch
NUM_ROWS = 1
FIRST_SLOT = 2  # offset in SLOTS
NUM_SLOTS = 3
FIRST_LAYER = 4  # active where FIRST_LAYER <= list_layer < END_LAYER
END_LAYER = 5
CAUSAL = 6  # row j of the item sees its slot i where i < CAUSAL + j
