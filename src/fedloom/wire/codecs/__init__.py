"""Codecs of tensors that are sent: casts, quantisers, sparsity, low rank, entropy coding."""

from fedloom.wire.codecs.pipeline import PRESETS, STAGES, Generators, Pipeline, pipeline

__all__ = ["PRESETS", "STAGES", "Generators", "Pipeline", "pipeline"]
