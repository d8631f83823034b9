"""Models that the one decoder cannot say: encoders with position biases of their own, models of two parts.

Each module takes the same flat batches as the decoder: token ids [N] of segments laid end to end, and an
`attend` whose `lengths` say where they end. No padding exists anywhere.
"""
