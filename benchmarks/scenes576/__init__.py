"""A benchmark of 576 visual tokens and the model that answers it; the README says how to train."""
