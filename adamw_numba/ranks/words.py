"""The words of the rows that ranks gather, and which of them have to be the same."""

# Norms are those of the variables that this rank counts, of those that all ranks have, and of those that some have;
# additions as in cpu/plan.py, -1 where there are none; the sample is a checksum of the gradients of variables that all
# ranks have; the cut and the last norm are of DTensors alone.
(
    STATUS, WHAT, ITERATION, RATE, DECAY, OTHERS, SETTINGS, CUT, SAMPLE, PRESENT, OWN_NORM, SHARED_NORM, ADDITIONS,
    TWIN_NORM, WORDS,
) = range(15)  # fmt: skip
# Where a loop goes around the steps (see `looping`), each row has more words, which minimizer/ranks.py explains.
VALUE, GRADIENT, MOVE, SIZE, SECONDS, STOPS, SHARED_X, MOST_WORDS = range(WORDS, WORDS + 8)
SHARED_GRADIENT = SAMPLE  # there the whole gradients are compared
FINE, FAILED = 0.0, 1.0
CALLS = (
    "build", "apply", "start", "evaluate", "callback", "recover", "end", "build of a Sharded", "apply of a Sharded",
    "save", "load", "restore", "verify of a Sharded", "averaged of a Sharded",
)  # fmt: skip
MARKED, MOST_MARKS = 16, 1 << 40  # a call's number, and this times the mark of an optimizer
MUST_AGREE = {
    CUT: "the variables, or which of them have gradients, differ",
    ITERATION: "the iterations differ",
    RATE: "the learning rates differ",
    DECAY: "the weight decays differ",
    OTHERS: "the rates of the groups differ",
    SETTINGS: "the hyperparameters differ",
    SAMPLE: "the gradients of the replicated variables differ",
    SHARED_NORM: "the gradients of the replicated variables differ: their norms are",
    SHARED_X: "the replicated variables differ: their checksums are",
}
