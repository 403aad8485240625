"""How many labels a score head has: what transformers writes of them."""

from __future__ import annotations

from ...core.errors import CheckpointError
from ..reader import Reader


def labels_of(hf: Reader) -> int:
    """transformers writes the labels' names and leaves both keys out where there are two.

    Raises:
        CheckpointError: two counts that differ, or none.
    """
    names, count = hf.get(dict, "id2label", default=None), hf.get(int, "num_labels", default=None)
    labels = 2 if names is None and count is None else count if names is None else len(names)
    if labels is None or labels < 1 or (count is not None and count != labels):
        raise CheckpointError(f"config.json: num_labels is {count}, id2label names {len(names or ())}: make them agree")
    return labels
