"""The parts of a forward pass that models share: the loss, packed rows, compiled and recomputed layers."""
