"""Losses and the state they keep per sample, behind one protocol."""
