"""The rows of the list of bugs that this field shipped, in a word each, and what stands in for them here."""

from tests.mutants.engines import ENGINES
from tests.mutants.losses import LOSSES
from tests.mutants.recovery import RECOVERED
from tests.mutants.resume import RESUME
from tests.mutants.rewards import REWARDS
from tests.mutants.tokens import TOKENS
from tests.mutants.training import TRAINING

ROWS = {
    "A1": "positions and padding",
    "A2": "log-probs beside their tokens",
    "A3": "values beside their states",
    "A5": "the reward model's last token",
    "A7": "padding that is the end of sequence",
    "A8": "last token overwritten",
    "A10": "end of sequence trimmed",
    "A11": "temperature",
    "A13": "dropout",
    "A15": "beginning of sequence",
    "A16": "tokenised again",
    "B1": "bootstrap from padding",
    "B2": "steps of the environment",
    "B5": "who belongs to whom",
    "B7": "a group of one",
    "B8": "nothing to divide by",
    "B10": "statistics and lengths",
    "B11": "rewards that are missing",
    "B12": "gradient of the KL",
    "B13": "clamps",
    "B15": "cut responses",
    "B16": "rewards that are NaN",
    "C1": "micro-batches",
    "C2": "what a token weighs",
    "C4": "denominators of a rank",
    "C5": "NaN off the mask",
    "C7": "bfloat16",
    "C9": "rates of groups",
    "D1": "tied weights",
    "D5": "old weights served",
    "D7": "prompts too long",
    "D8": "weights that did not arrive",
    "E1": "place in the data",
    "E4": "seeds",
    "E5": "state that is not saved",
    "E6": "half a checkpoint",
}
MUTANTS = (*TOKENS, *REWARDS, *LOSSES, *TRAINING, *ENGINES, *RESUME, *RECOVERED)
