"""What memory is held for: the rows of a budget."""

from __future__ import annotations

PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER = "optimiser state"
REFERENCE = "reference, teacher"
ACTIVATIONS = "activations"
LOSS = "loss workspace"
UNSHARDED = "unsharded"
WORKSPACE = "optimiser workspace"
KINDS = (
    PARAMETERS,
    GRADIENTS,
    OPTIMIZER,
    REFERENCE,
    UNSHARDED,
    ACTIVATIONS,
    LOSS,
    WORKSPACE,
)
LASTING = (PARAMETERS, GRADIENTS, OPTIMIZER, REFERENCE)
