"""Updates: log-probs of the policy, the SFT and GRPO steps, the optimizer.

It may import model, kernels, system and the method's modules.
"""
