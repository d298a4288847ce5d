"""The evidence rules: preregistration, certificate, divergence, fidelity to the paper."""
